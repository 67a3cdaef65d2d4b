"""How one answer is judged: one file per family; a class is found by its name, `residency.scorers.ChrF`."""

from __future__ import annotations

from typing import Any

from residency.scorers.base import Answer, LabelScore, Scorer

__all__ = ["Answer", "LabelScore", "Scorer"]


def __getattr__(name: str) -> Any:
    """Scorers of this folder by class name, without an export list."""
    if name.startswith("_") or not name[:1].isupper():
        raise AttributeError(name)
    from residency.scorers.find import scorer_classes

    if name not in scorer_classes():
        raise AttributeError(f"residency.scorers has no {name}; there are {', '.join(sorted(scorer_classes()))}")
    return scorer_classes()[name]
