"""Which coordinates move, and how they step."""

from residency.adapters.base import Adapter
from residency.adapters.full import Full
from residency.adapters.peft import Peft

__all__ = ["Adapter", "Full", "Peft"]
