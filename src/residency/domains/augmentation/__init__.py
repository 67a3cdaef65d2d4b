"""Further training rows made of those of a domain: `augment` of a domain. One file per method."""

from typing import Any

from residency.core.plug_ins import load_plug_ins
from residency.domains.augmentation.base import Augmentation

__all__ = ["Augmentation", *load_plug_ins(globals(), "Augmentation", below=False)]


def __getattr__(name: str) -> Any:
    # Never reached for a class that is there: it tells type checkers that names are found when the package is imported.
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
