"""worst since: see `min_accuracy`."""

from __future__ import annotations

import numpy as np

from residency.metrics.definitions.base import About, Scores, mean, until

__all__ = ["ABOUT", "min_accuracy"]

ABOUT = About(
    kind="level",
    title="worst since",
    help="min-ACC: the lowest score of each old domain after any later stage, averaged",
    rank=80,
)


def min_accuracy(R: Scores, *, higher_is_better: bool, after: int | None = None) -> float:
    """min-ACC = mean_{j<k} min_{j<l≤k} u[l, j], k = `after` or T (De Lange et al. 2023). NaN for k = 1."""
    u, k = until(R, higher_is_better, after)
    return mean(np.array([u[j + 1 : k + 1, j - 1].min() for j in range(1, k)]))
