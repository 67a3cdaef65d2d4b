"""Two models on the same rows: the paired test, and which rows got better or worse. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.stats  # type: ignore[import-untyped]

from residency.metrics.crossed import Crossed, crossed, influence
from residency.metrics.example_level import mcnemar
from residency.metrics.statistics import FloatArray, sign_flip, vector

__all__ = ["FlipRates", "PairedChange", "flip_rates", "paired_change"]

_MANY = 1000  # rows; from here on the mean of differences is normal, and sign patterns cost memory


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedChange:
    """What became of the same rows.

    Args:
        n: Rows.
        before: Mean score of the first model, weighted.
        after: Of the second.
        change: after - before, in the score's own direction.
        low: Lower end of the 95 % interval of the change, over rows (not over seeds); NaN below 2 rows.
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
        seed: Of sign flips that are too many to try.

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
    found = crossed([means[1] - means[0]], [{"rows": influence(y - x, w)}])
    test, p = _paired_test(x, y, seed)
    order = np.argsort(gain, kind="stable")
    return PairedChange(
        n=int(x.size),
        before=means[0],
        after=means[1],
        change=means[1] - means[0],
        low=found.low,
        high=found.high,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipRates:
    """Right and wrong answers of two methods on the same rows, over seeds.

    Args:
        lost: Share of rows that were right and are wrong: negative flips, mean over domains, then over seeds.
        gained: Share of rows that were wrong and are right: positive flips. Their difference is the change of accuracy.
        p: Seed by seed, the exact McNemar p over all its rows: of two trained models, not of two methods.
    """

    lost: Crossed
    gained: Crossed
    p: tuple[float, ...]


Answers = Mapping[str, npt.ArrayLike]


def flip_rates(pairs: Sequence[tuple[Answers, Answers]]) -> FlipRates:
    """Flip rates with 95 % intervals over seeds and rows, which are crossed: every seed answers the same rows.

    Args:
        pairs: Per seed (before, after): domain -> (R,) scores of 0 or 1, the same rows in the same order everywhere.

    Raises:
        ValueError: No seed, a score that is neither 0 nor 1, or other rows.

    >>> found = flip_rates([({"a": [1, 1, 0, 0]}, {"a": [0, 1, 1, 1]})])
    >>> found.lost.estimate, found.gained.estimate
    (0.25, 0.5)
    """
    lost: list[dict[str, FloatArray]] = []
    gained: list[dict[str, FloatArray]] = []
    tests = []
    for before, after in pairs:
        share = 1 / max(1, len(before))
        x, y = ({name: vector(own, name) for name, own in answers.items()} for answers in (before, after))
        tests.append(mcnemar(np.concatenate([*x.values()]), np.concatenate([y[name] for name in x])))
        lost.append({name: share * ((x[name] == 1) & (y[name] == 0)).astype(np.float64) for name in x})
        gained.append({name: share * ((x[name] == 0) & (y[name] == 1)).astype(np.float64) for name in x})
    rates = [
        crossed([sum(float(part.mean()) for part in own.values()) for own in side], side) for side in (lost, gained)
    ]
    return FlipRates(lost=rates[0], gained=rates[1], p=tuple(tests))
