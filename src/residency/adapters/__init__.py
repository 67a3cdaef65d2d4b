"""Which coordinates move, and how they step."""

from residency.adapters.base import Adapter
from residency.adapters.full import Full
from residency.adapters.inc_lora import IncLoRA
from residency.adapters.osf import OSF
from residency.adapters.peft import Peft

__all__ = ["OSF", "Adapter", "Full", "IncLoRA", "Peft"]
