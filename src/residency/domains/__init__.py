"""Readers of data sets: a domain gives rows of text in splits that do not leak."""

from typing import Any

from residency.core.plug_ins import load_plug_ins
from residency.domains.base import Domain, Template
from residency.domains.chat import Chat

__all__ = ["Chat", "Domain", "Template", *load_plug_ins(globals(), "Domain", below=False)]


def __getattr__(name: str) -> Any:
    # Never reached for a class that is there: it tells type checkers that names are found when the package is imported.
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
