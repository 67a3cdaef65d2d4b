"""What protects earlier knowledge; any number per run, in order."""

from residency.mitigations.base import Mitigation
from residency.mitigations.ewc import EWC
from residency.mitigations.ewc_kfac import KroneckerEWC
from residency.mitigations.l2_sp import L2SP
from residency.mitigations.mas import MAS
from residency.mitigations.replay import Replay
from residency.mitigations.si import SI
from residency.mitigations.weight_mixing import WeightMixing

__all__ = ["EWC", "L2SP", "MAS", "SI", "KroneckerEWC", "Mitigation", "Replay", "WeightMixing"]
