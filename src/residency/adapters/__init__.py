"""Which coordinates move, and how they step."""

from residency.adapters.base import Adapter
from residency.adapters.full import Full
from residency.adapters.osf import OSF
from residency.adapters.peft import Peft
from residency.adapters.per_domain import PerDomain
from residency.adapters.progressive_prompts import ProgressivePrompts

__all__ = ["OSF", "Adapter", "Full", "Peft", "PerDomain", "ProgressivePrompts"]
