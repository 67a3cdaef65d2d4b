"""What the examples of one evaluation set can show by themselves: the level below seeds. Pure functions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.stats

from residency.metrics.statistics import vector

__all__ = ["mcnemar"]


def mcnemar(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Exact two-sided p that two models get equally many of the *same* examples right (McNemar 1947).

    A second level below seeds: it speaks of two trained models, not of two methods.

    Args:
        a: (n,) 0 or 1 per example.
        b: (n,) of the other model, same examples in the same order.
    """
    x, y = vector(a, "a"), vector(b, "b")
    if x.shape != y.shape or not np.isin(np.concatenate([x, y]), (0.0, 1.0)).all():
        raise ValueError("a and b are scores of 0 or 1 on the same examples in the same order")
    only_a, only_b = int(((x == 1) & (y == 0)).sum()), int(((x == 0) & (y == 1)).sum())
    return float(scipy.stats.binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
