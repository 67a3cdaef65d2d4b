"""forgetting, %: see `relative_forgetting`."""

from __future__ import annotations

import numpy as np

from residency.metrics.definitions.base import About, Scores, learned, mean, utility

__all__ = ["ABOUT", "relative_forgetting"]

ABOUT = About(
    kind="loss",
    title="forgetting, %",
    help="forgetting in percent of the score when just learnt; above 0 is bad",
    rank=70,
)


def relative_forgetting(R: Scores, *, higher_is_better: bool, floor: float = 1e-3) -> float:
    """100 · mean_{j<T} (u[j, j] - u[T, j]) / |u[j, j]|, in percent; positive is bad. NaN for T = 1.

    Of a loss it is the relative increase ("loss-relative drift"). |u[j, j]| under `floor` gives NaN, not noise.
    """
    u = utility(R, higher_is_better=higher_is_better)
    old = learned(u)[:-1]
    size = np.where((np.abs(old) >= floor) & (old != 0), np.abs(old), np.nan)
    return 100.0 * mean((old - u[-1, :-1]) / size)
