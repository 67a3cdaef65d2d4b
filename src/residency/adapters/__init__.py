"""Which coordinates move, and how they step."""

from residency.adapters.base import Adapter
from residency.adapters.bottleneck import Bottleneck
from residency.adapters.freeze import Freeze
from residency.adapters.full import Full
from residency.adapters.galore import GaLore
from residency.adapters.inc_lora import IncLoRA
from residency.adapters.inf_lora import InfLoRA
from residency.adapters.osf import OSF
from residency.adapters.peft import Peft
from residency.adapters.per_domain import PerDomain
from residency.adapters.progressive_prompts import ProgressivePrompts
from residency.adapters.sinkhorn import SinkhornResidual
from residency.adapters.slao import SLAO

__all__ = [
    "OSF",
    "SLAO",
    "Adapter",
    "Bottleneck",
    "Freeze",
    "Full",
    "GaLore",
    "IncLoRA",
    "InfLoRA",
    "Peft",
    "PerDomain",
    "ProgressivePrompts",
    "SinkhornResidual",
]
