"""What protects earlier knowledge; any number per run, in order."""

from residency.mitigations.base import Mitigation
from residency.mitigations.ewc import EWC
from residency.mitigations.on_policy_distillation import OnPolicyDistillation
from residency.mitigations.replay import Replay
from residency.mitigations.sdft import SDFT
from residency.mitigations.self_distillation import SelfDistillation
from residency.mitigations.weight_mixing import WeightMixing

__all__ = ["EWC", "SDFT", "Mitigation", "OnPolicyDistillation", "Replay", "SelfDistillation", "WeightMixing"]
