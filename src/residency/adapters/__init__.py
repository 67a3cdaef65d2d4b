"""Which coordinates move, and how they step."""

from residency.adapters.base import Adapter
from residency.adapters.bottleneck import Bottleneck
from residency.adapters.freeze import Freeze
from residency.adapters.full import Full
from residency.adapters.galore import GaLore
from residency.adapters.osf import OSF
from residency.adapters.peft import Peft
from residency.adapters.per_domain import PerDomain
from residency.adapters.progressive_prompts import ProgressivePrompts
from residency.adapters.sinkhorn import SinkhornResidual

__all__ = [
    "OSF",
    "Adapter",
    "Bottleneck",
    "Freeze",
    "Full",
    "GaLore",
    "Peft",
    "PerDomain",
    "ProgressivePrompts",
    "SinkhornResidual",
]
