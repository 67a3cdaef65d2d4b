"""Tables, pictures and the page, from records alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["build"]


def build(
    paths: Sequence[str | Path] | str | Path,
    *,
    output: str | Path | None = None,
    references: Iterable[str] = (),
    **choices: Any,
) -> Path:
    """Write the report of runs or studies; see `residency.report.page.build.build`, which this loads when called."""
    from residency.report.page import build as assemble

    return assemble.build(paths, output=output, references=references, **choices)
