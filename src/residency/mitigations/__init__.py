"""What protects earlier knowledge; any number per run, in order."""

from residency.mitigations.base import Mitigation
from residency.mitigations.der import DER
from residency.mitigations.ewc import EWC
from residency.mitigations.ewc_kfac import KroneckerEWC
from residency.mitigations.gem import AGEM, GEM
from residency.mitigations.generative import GenerativeReplay
from residency.mitigations.gpm import GPM
from residency.mitigations.l2_sp import L2SP
from residency.mitigations.mas import MAS
from residency.mitigations.migu import MIGU
from residency.mitigations.ogd import OGD
from residency.mitigations.on_policy_distillation import OnPolicyDistillation
from residency.mitigations.replay import Replay
from residency.mitigations.sdft import SDFT
from residency.mitigations.self_distillation import SelfDistillation
from residency.mitigations.si import SI
from residency.mitigations.source_shielding import SourceShielding
from residency.mitigations.weight_mixing import WeightMixing
from residency.mitigations.zclip import ZClip

__all__ = [
    "AGEM",
    "DER",
    "EWC",
    "GEM",
    "GPM",
    "L2SP",
    "MAS",
    "MIGU",
    "OGD",
    "SDFT",
    "SI",
    "GenerativeReplay",
    "KroneckerEWC",
    "Mitigation",
    "OnPolicyDistillation",
    "Replay",
    "SelfDistillation",
    "SourceShielding",
    "WeightMixing",
    "ZClip",
]
