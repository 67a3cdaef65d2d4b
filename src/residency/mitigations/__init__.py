"""What protects earlier knowledge; any number per run, in order."""

from typing import Any

from residency.core.plug_ins import load_plug_ins
from residency.mitigations.base import Mitigation

__all__ = ["Mitigation", *load_plug_ins(globals(), "Mitigation")]


def __getattr__(name: str) -> Any:
    # Never reached for a class that is there: it tells type checkers that names are found when the package is imported.
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
