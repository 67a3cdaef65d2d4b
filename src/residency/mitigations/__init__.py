"""What protects earlier knowledge; any number per run, in order."""

from residency.mitigations.base import Mitigation
from residency.mitigations.constraints.gem import AGEM, GEM
from residency.mitigations.constraints.gpm import GPM
from residency.mitigations.constraints.migu import MIGU
from residency.mitigations.constraints.ogd import OGD
from residency.mitigations.constraints.source_shielding import SourceShielding
from residency.mitigations.constraints.zclip import ZClip
from residency.mitigations.distillation.on_policy_distillation import OnPolicyDistillation
from residency.mitigations.distillation.sdft import SDFT
from residency.mitigations.distillation.self_distillation import SelfDistillation
from residency.mitigations.early_stopping import EarlyStopping
from residency.mitigations.merging.dare import DARE
from residency.mitigations.merging.ema import EMA
from residency.mitigations.merging.fisher_merge import FisherMerge
from residency.mitigations.merging.intruder_reduction import IntruderReduction
from residency.mitigations.merging.slerp import SLERP
from residency.mitigations.merging.soup import Soup
from residency.mitigations.merging.task_arithmetic import TaskArithmetic
from residency.mitigations.merging.ties import TIES
from residency.mitigations.merging.weight_mixing import WeightMixing
from residency.mitigations.merging.wise_ft import WiseFT
from residency.mitigations.penalties.ewc import EWC
from residency.mitigations.penalties.ewc_kfac import KroneckerEWC
from residency.mitigations.penalties.l2_sp import L2SP
from residency.mitigations.penalties.mas import MAS
from residency.mitigations.penalties.si import SI
from residency.mitigations.rehearsal.der import DER
from residency.mitigations.rehearsal.generative import GenerativeReplay
from residency.mitigations.rehearsal.replay import Replay

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
