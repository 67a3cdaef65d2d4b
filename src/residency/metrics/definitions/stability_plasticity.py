"""stability · plasticity: see `stability_plasticity`."""

from __future__ import annotations

import math

from residency.metrics.definitions.base import About, Scores
from residency.metrics.definitions.plasticity import plasticity
from residency.metrics.definitions.stability import stability

__all__ = ["ABOUT", "stability_plasticity"]

ABOUT = About(
    kind="gain",
    title="stability · plasticity",
    help="SP: harmonic mean of retained and plasticity",
    rank=130,
    needs="single",
)


def stability_plasticity(R: Scores, *, higher_is_better: bool, single: Scores) -> float:
    """SP = 2·ST·PL / (ST + PL), the harmonic mean; NaN if one is negative or the sum is 0."""
    st = stability(R, higher_is_better=higher_is_better)
    pl = plasticity(R, higher_is_better=higher_is_better, single=single)
    return 2 * st * pl / (st + pl) if min(st, pl) >= 0 and st + pl > 0 else math.nan
