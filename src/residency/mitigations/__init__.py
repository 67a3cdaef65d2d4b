"""What protects earlier knowledge; any number per run, in order."""

from residency.mitigations.base import Mitigation
from residency.mitigations.dare import DARE
from residency.mitigations.der import DER
from residency.mitigations.early_stopping import EarlyStopping
from residency.mitigations.ema import EMA
from residency.mitigations.ewc import EWC
from residency.mitigations.ewc_kfac import KroneckerEWC
from residency.mitigations.fisher_merge import FisherMerge
from residency.mitigations.gem import AGEM, GEM
from residency.mitigations.generative import GenerativeReplay
from residency.mitigations.gpm import GPM
from residency.mitigations.intruder_reduction import IntruderReduction
from residency.mitigations.l2_sp import L2SP
from residency.mitigations.mas import MAS
from residency.mitigations.migu import MIGU
from residency.mitigations.ogd import OGD
from residency.mitigations.on_policy_distillation import OnPolicyDistillation
from residency.mitigations.replay import Replay
from residency.mitigations.sdft import SDFT
from residency.mitigations.self_distillation import SelfDistillation
from residency.mitigations.si import SI
from residency.mitigations.slerp import SLERP
from residency.mitigations.soup import Soup
from residency.mitigations.source_shielding import SourceShielding
from residency.mitigations.task_arithmetic import TaskArithmetic
from residency.mitigations.ties import TIES
from residency.mitigations.weight_mixing import WeightMixing
from residency.mitigations.wise_ft import WiseFT
from residency.mitigations.zclip import ZClip

__all__ = [
    "AGEM",
    "DARE",
    "DER",
    "EMA",
    "EWC",
    "GEM",
    "GPM",
    "L2SP",
    "MAS",
    "MIGU",
    "OGD",
    "SDFT",
    "SI",
    "SLERP",
    "TIES",
    "EarlyStopping",
    "FisherMerge",
    "GenerativeReplay",
    "IntruderReduction",
    "KroneckerEWC",
    "Mitigation",
    "OnPolicyDistillation",
    "Replay",
    "SelfDistillation",
    "Soup",
    "SourceShielding",
    "TaskArithmetic",
    "WeightMixing",
    "WiseFT",
    "ZClip",
]
