"""What is minimised on one batch."""

from typing import Any

from residency.core.plug_ins import load_plug_ins
from residency.objectives.base import Objective

__all__ = ["Objective", *load_plug_ins(globals(), "Objective")]


def __getattr__(name: str) -> Any:
    # Never reached for a class that is there: it tells type checkers that names are found when the package is imported.
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
