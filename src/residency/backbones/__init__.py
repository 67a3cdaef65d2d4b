"""Pretrained models and their tokenizers."""

from typing import Any

from residency.backbones.base import Backbone
from residency.backbones.quantisation import Quantisation
from residency.core.plug_ins import load_plug_ins

__all__ = ["Backbone", "Quantisation", *load_plug_ins(globals(), "Backbone")]


def __getattr__(name: str) -> Any:
    # Never reached for a class that is there: it tells type checkers that names are found when the package is imported.
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
