"""Domains that `residency assets` provides: one file per reader, data from pinned packages."""

from typing import Any

from residency.core.plug_ins import load_plug_ins

__all__ = [*load_plug_ins(globals(), "Domain")]


def __getattr__(name: str) -> Any:
    # Never reached for a class that is there: it tells type checkers that names are found when the package is imported.
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
