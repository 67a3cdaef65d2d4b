"""Two models on the same rows: the paired test, and which rows got better or worse. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.stats  # type: ignore[import-untyped]

from residency.metrics.bootstrap import bootstrap_interval
from residency.metrics.example_level import mcnemar
from residency.metrics.statistics import FloatArray, sign_flip, vector

__all__ = ["PairedChange", "paired_change"]

_MANY = 1000  # rows; from here on the mean of differences is normal, and sign patterns cost memory


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedChange:
    """What became of the same rows.

    Args:
        n: Rows.
        before: Mean score of the first model, weighted.
        after: Of the second.
        change: after - before, in the score's own direction.
        low: Lower end of the 95 % interval of the change, by a bootstrap over rows; NaN below 2 rows.
        high: Its upper end.
        p: Two-sided: exact McNemar for scores of 0 and 1, else sign flips of the rows' differences, from 1,000 rows on
            the paired t-test.
        test: `mcnemar`, `sign_flip` or `paired_t`.
        worse: Share of rows that the second model scores worse; of scores of 0 and 1, the negative flips.
        better: Share that it scores better: the positive flips. A change of 0 may hide many of both.
        regressed: Places of the rows that are worse, the largest loss first.
    """

    n: int
    before: float
    after: float
    change: float
    low: float
    high: float
    p: float
    test: str
    worse: float
    better: float
    regressed: tuple[int, ...]


def paired_change(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    *,
    higher_is_better: bool,
    weights: npt.ArrayLike | None = None,
    seed: int = 0,
) -> PairedChange:
    """Compare two models row by row.

    Args:
        before: (n,) scores of the first model.
        after: (n,) scores of the second, the same rows in the same order.
        higher_is_better: Orientation; decides what is worse, not the sign of the change.
        weights: (n,) of the rows in the mean; equal by default.
        seed: Of the bootstrap and of sign flips that are too many to try.

    Raises:
        ValueError: Not the same number of rows, or none.

    >>> change = paired_change([1, 1, 0, 0], [0, 1, 1, 1], higher_is_better=True)
    >>> change.worse, change.better, change.change
    (0.25, 0.5, 0.25)
    """
    x, y = vector(before, "before"), vector(after, "after")
    if x.shape != y.shape or not x.size:
        raise ValueError(f"{x.size} rows before and {y.size} after: give the same rows, at least one")
    w = np.ones_like(x) if weights is None else vector(weights, "weights")
    means = [float(np.average(v, weights=w)) for v in (x, y)]
    gain = (y - x) if higher_is_better else (x - y)
    low = high = float("nan")
    if x.size > 1:
        interval = bootstrap_interval([[y - x]], weights=[[w]], seed=seed)
        low, high = interval.low, interval.high
    test, p = _paired_test(x, y, seed)
    order = np.argsort(gain, kind="stable")
    return PairedChange(
        n=int(x.size),
        before=means[0],
        after=means[1],
        change=means[1] - means[0],
        low=low,
        high=high,
        p=p,
        test=test,
        worse=float((gain < 0).mean()),
        better=float((gain > 0).mean()),
        regressed=tuple(int(i) for i in order if gain[i] < 0),
    )


def _paired_test(x: FloatArray, y: FloatArray, seed: int) -> tuple[str, float]:
    """(name, p) of the test that suits the scores."""
    if np.isin(np.concatenate([x, y]), (0.0, 1.0)).all():
        return "mcnemar", mcnemar(x, y)
    if not (y != x).any():
        return "sign_flip", 1.0
    if x.size < _MANY:
        return "sign_flip", float(sign_flip(y - x, seed=seed).p)
    return "paired_t", float(scipy.stats.ttest_rel(y, x).pvalue)
