"""What is minimised on one batch."""

from residency.objectives.base import Objective
from residency.objectives.sft import SFT

__all__ = ["SFT", "Objective"]
