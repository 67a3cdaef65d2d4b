"""Between the rows of the score matrix: curves over training time (E10)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["learning_curve_area", "stability_gap"]


def learning_curve_area(samples: npt.ArrayLike, average: npt.ArrayLike) -> float:
    """ALC: trapezoid of ACC over samples seen, divided by the samples between the first point and the last.

    Args:
        samples: (n,) samples (or tokens) seen so far at each evaluation, strictly rising.
        average: (n,) ACC over the domains seen so far, in utility.

    Returns:
        In the unit of ACC; NaN for fewer than 2 points or where one is missing.

    >>> learning_curve_area([0, 100, 200], [0.0, 0.5, 0.7])
    0.425
    """
    x, y = np.asarray(samples, dtype=np.float64), np.asarray(average, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or (np.diff(x) <= 0).any():
        raise ValueError("samples must rise strictly, with one average each")
    area = (np.diff(x) * (y[1:] + y[:-1]) / 2).sum()
    return float(area / (x[-1] - x[0])) if x.size > 1 else math.nan


def stability_gap(scores: npt.ArrayLike, *, higher_is_better: bool) -> float:
    """min over a window - its start, in utility: how deep an old domain falls while a new one is learnt, even if it
    recovers (De Lange et al. 2023). 0 = never below the start; negative = fell.

    Args:
        scores: (n,) scores on one old domain, evaluated every few steps; the first is from before the first step.
        higher_is_better: Direction.

    >>> stability_gap([0.9, 0.4, 0.85], higher_is_better=True)
    -0.5
    """
    x = np.asarray(scores, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"scores have shape {x.shape}: give the (n,) scores of one domain")
    u = x if higher_is_better else -x
    return float(u.min() - u[0])
