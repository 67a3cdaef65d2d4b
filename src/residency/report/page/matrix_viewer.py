"""Data of the page's matrix viewer: every score matrix, one at a time, bounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from residency.report.records.arms import Arm, matrices

__all__ = ["viewer_data"]

# Numbers that the page carries for it.
_NUMBERS = 120_000


def viewer_data(arms: Sequence[Arm], scorer: str, *, first: str | None) -> tuple[dict[str, Any] | None, str]:
    """All score matrices for the page's viewer, the recommended method first; bounded."""
    found = matrices(arms, scorer)
    if not found:
        return None, ""
    found.sort(key=lambda m: m["value"] != first)
    size = 0
    kept: list[dict[str, Any]] = []
    for matrix in found:
        size += sum(len(row) for R in matrix["R"].values() for row in R)
        if kept and size > _NUMBERS:
            break
        kept.append({key: matrix[key] for key in ("name", "columns", "domains", "R")})
    scorers = []
    for name in dict.fromkeys(name for matrix in kept for name in matrix["R"]):
        values = [v for m in kept for row in m["R"].get(name, []) for v in row if v is not None] or [0.0, 1.0]
        low, high, higher = min(values), max(values), next(m["higher"][name] for m in found if name in m["higher"])
        log = not higher and low > 0 and high / low > 4
        digits = 3 if max(abs(low), abs(high)) <= 1 else 2
        scorers.append({"name": name, "low": low, "high": high, "higher": higher, "log": log, "digits": digits})
    left = len(found) - len(kept)
    note = f"{left} more methods are in tables/scores.parquet." if left else ""
    return {"methods": kept, "scorers": scorers}, note
