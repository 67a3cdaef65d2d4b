"""Published numbers beside the user's own, with source and provenance; never a pass mark."""

from __future__ import annotations

from collections.abc import Iterable

from residency.report.grids import Grid, plain_grid

__all__ = ["published_grid"]


def published_grid(names: Iterable[str]) -> Grid | None:
    """The rows of the named tables; `None` if none was asked for."""
    names = list(names)
    if not names:
        return None
    return plain_grid("published", "Published numbers", [])
