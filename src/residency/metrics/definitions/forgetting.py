"""forgetting: see `forgetting`."""

from __future__ import annotations

import numpy as np

from residency.metrics.definitions.base import About, Scores, mean, until

__all__ = ["ABOUT", "forgetting"]

ABOUT = About(
    kind="loss",
    title="forgetting",
    help="best score since learnt minus score at the end, averaged; above 0 is bad",
    rank=40,
)


def forgetting(R: Scores, *, higher_is_better: bool, after: int | None = None) -> float:
    """F = mean_{j<k} (max_{j≤l<k} u[l, j] - u[k, j]), k = `after` or T (Chaudhry et al. 2018). NaN for k = 1.

    Positive is bad; negative if the last row is the best. Never below -`bwt`.

    >>> forgetting([[0, 0], [8, 1], [6, 9]], higher_is_better=True)
    2.0
    """
    u, k = until(R, higher_is_better, after)
    best = np.array([u[j:k, j - 1].max() for j in range(1, k)])
    return mean(best - u[k, : k - 1])
