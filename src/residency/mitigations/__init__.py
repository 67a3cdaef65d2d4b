"""What protects earlier knowledge; any number per run, in order."""

from residency.mitigations.base import Mitigation
from residency.mitigations.dare import DARE
from residency.mitigations.early_stopping import EarlyStopping
from residency.mitigations.ema import EMA
from residency.mitigations.ewc import EWC
from residency.mitigations.fisher_merge import FisherMerge
from residency.mitigations.intruder_reduction import IntruderReduction
from residency.mitigations.replay import Replay
from residency.mitigations.slerp import SLERP
from residency.mitigations.soup import Soup
from residency.mitigations.task_arithmetic import TaskArithmetic
from residency.mitigations.ties import TIES
from residency.mitigations.weight_mixing import WeightMixing
from residency.mitigations.wise_ft import WiseFT

__all__ = [
    "DARE",
    "EMA",
    "EWC",
    "SLERP",
    "TIES",
    "EarlyStopping",
    "FisherMerge",
    "IntruderReduction",
    "Mitigation",
    "Replay",
    "Soup",
    "TaskArithmetic",
    "WeightMixing",
    "WiseFT",
]
