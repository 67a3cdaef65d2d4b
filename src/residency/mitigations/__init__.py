"""What protects earlier knowledge; any number per run, in order."""

from residency.mitigations.base import Mitigation
from residency.mitigations.der import DER
from residency.mitigations.ewc import EWC
from residency.mitigations.generative import GenerativeReplay
from residency.mitigations.replay import Replay
from residency.mitigations.weight_mixing import WeightMixing

__all__ = ["DER", "EWC", "GenerativeReplay", "Mitigation", "Replay", "WeightMixing"]
