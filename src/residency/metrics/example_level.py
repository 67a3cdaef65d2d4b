"""What the examples of one evaluation set can show by themselves: the level below seeds. Pure functions."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import scipy.stats

from residency.metrics.statistics import Interval, t_interval, vector

__all__ = ["mcnemar", "noise_floor", "wilson_interval"]


def wilson_interval(*, successes: float, n: int, level: float = 0.95) -> Interval:
    """Interval of a share, right also at 0 and 1 (Wilson 1927).

    >>> interval = wilson_interval(successes=10, n=10)
    >>> round(interval.low, 3), round(interval.high, 3)
    (0.722, 1.0)
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}: give 0 <= successes <= n, n >= 1")
    z = float(scipy.stats.norm.ppf((1 + level) / 2))
    share, shrink = successes / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    ends = {"low": max(0.0, centre - half), "high": min(1.0, centre + half)}
    return Interval(estimate=share, **ends, level=level, method="wilson", n=n)


def noise_floor(scores: npt.ArrayLike, *, level: float = 0.95) -> float:
    """How far the mean of an evaluation set of this size can be off by the choice of its examples alone.

    Half-width of the interval of the mean: Wilson for scores of 0 and 1, Student otherwise. Two models whose scores
    differ by less cannot be told apart by this set, however many seeds are run. Given the (n,) per-example
    *differences* of two models instead of scores, it is the floor of their paired difference.

    Args:
        scores: (n,) per-example scores, or differences.
        level: Coverage.

    >>> round(noise_floor([1, 0] * 50), 3)
    0.096
    """
    x = vector(scores, "scores")
    if x.size and np.isin(x, (0.0, 1.0)).all():
        return wilson_interval(successes=float(x.sum()), n=x.size, level=level).half_width
    return t_interval(x, level=level).half_width


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
