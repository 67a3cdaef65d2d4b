"""How far numbers can be trusted: intervals, exact tests, effect sizes, noise floors. Pure functions of arrays.

The unit of every test is the **seed**: one value per seed (and order), paired between methods by seed, order and data
split. Examples of one evaluation set are no independent repetitions of training: they are a second sample, crossed with
the seeds (`residency.metrics.crossed`). What may be said about a difference: `residency.report.evidence`.

NaN in, NaN out: a missing value is never dropped here. Decide what to leave out before, and say so.
Not imported by `residency.metrics`, because scipy.stats takes a second to load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.stats

__all__ = [
    "Interval",
    "SignFlip",
    "effect_size",
    "holm",
    "iqm",
    "order_sensitivity",
    "paired_t",
    "probability_of_improvement",
    "sign_flip",
    "smallest_p",
    "t_interval",
]

FloatArray = npt.NDArray[np.float64]
# 2^20 patterns of signs take a quarter of a second; beyond, they are drawn.
_EXACT = 20
_DRAWS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate and where it may lie.

    Args:
        estimate: The point estimate, in the unit of the values.
        low: Lower end; NaN where the data allow none.
        high: Upper end.
        level: Coverage, for example 0.95.
        method: `t`.
        n: Number of independent units (seeds, or examples of one set).
    """

    estimate: float
    low: float
    high: float
    level: float
    method: str
    n: int

    @property
    def half_width(self) -> float:
        """Half of the length; the "±" of a t-interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SignFlip:
    """Result of `sign_flip`.

    Args:
        p: Two-sided p-value.
        smallest_p: The smallest p that this many nonzero differences can reach, whatever their size.
        n: Number of pairs.
        exact: Whether all 2^n patterns were counted (otherwise they were drawn).
    """

    p: float
    smallest_p: float
    n: int
    exact: bool


def vector(values: npt.ArrayLike, name: str = "values") -> FloatArray:
    """A (n,) array; ValueError for anything else."""
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1:
        raise ValueError(f"{name} has shape {found.shape}, and a test needs one number per seed: average domains first")
    return found


def _varies(d: FloatArray) -> bool:
    """Whether values differ by more than rounding; a ratio to their spread means something only then."""
    return not np.ptp(d) <= 1e-12 * np.abs(d).max()


def t_interval(values: npt.ArrayLike, *, level: float = 0.95) -> Interval:
    """mean ± t_{(1+level)/2, n-1} · sd/√n over n seeds (Student 1908); no ends for n = 1.

    >>> interval = t_interval([1.46, 1.97, 2.54])
    >>> round(interval.estimate, 2), round(interval.half_width, 3)
    (1.99, 1.342)
    """
    x = vector(values)
    estimate = float(x.mean()) if x.size else math.nan
    half = math.nan
    if x.size > 1:
        half = float(scipy.stats.t.ppf((1 + level) / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size))
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half, level=level, method="t", n=x.size)


def iqm(values: npt.ArrayLike) -> float:
    """Interquartile mean over all values, for example seeds × domains (Agarwal et al. 2021, rliable).

    The 25 % trimmed mean: int(n/4) values are cut at each end, so of fewer than 4 values it is the mean.

    >>> iqm([1, 2, 3, 100])
    2.5
    """
    x = np.asarray(values, dtype=np.float64).ravel()
    return float(scipy.stats.trim_mean(x, 0.25)) if x.size and not np.isnan(x).any() else math.nan


def probability_of_improvement(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """P(a > b) + ½ P(a = b) over all pairs of seeds, averaged over domains (Agarwal et al. 2021); 0.5 = no difference.

    Args:
        a: (n,) or (n, T) utilities (higher is better) by seed, and domain.
        b: (m,) or (m, T).

    >>> probability_of_improvement([1, 2], [1, 0])
    0.875
    """
    x, y = (np.asarray(v, dtype=np.float64) for v in (a, b))
    x, y = (v[:, None] if v.ndim == 1 else v for v in (x, y))
    if x.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"a has shape {x.shape} and b {y.shape}: give (seeds,) or (seeds, domains) with equal domains")
    difference = x[:, None] - y[None, :]
    return float(np.where(np.isnan(difference), np.nan, (np.sign(difference) + 1) / 2).mean())


def smallest_p(n: int) -> float:
    """2/2^n, the smallest two-sided p of a sign-flip test on n nonzero differences; 1 for n = 0.

    >>> [smallest_p(n) for n in (3, 5, 6)]
    [0.25, 0.0625, 0.03125]
    """
    return min(1.0, 2.0 ** (1 - n))


def sign_flip(differences: npt.ArrayLike, *, seed: int = 0) -> SignFlip:
    """Exact two-sided test that paired differences are symmetric around 0 (Fisher 1935): flips all signs.

    p = share of the 2^n sign patterns with |Σ ±d| >= |Σ d|. Beyond 20 pairs 100,000 patterns are drawn, and p is
    (1 + hits)/(1 + draws).

    Args:
        differences: (n,), one per seed.
        seed: Of the drawn patterns.

    >>> sign_flip([1, 1, 1, 1, 1, 1]).p, sign_flip([1, 2, 3]).p
    (0.03125, 0.25)
    """
    d = vector(differences, "differences")
    nonzero, exact = int(np.count_nonzero(d)), d.size <= _EXACT
    result: dict[str, Any] = {"smallest_p": smallest_p(nonzero), "n": d.size, "exact": exact}
    if d.size == 0 or np.isnan(d).any():
        return SignFlip(p=math.nan, **result)
    # Sums of the same numbers in another order differ by rounding, and must still count as equal.
    reached = abs(d.sum()) * (1 - 1e-12) - 1e-12 * np.abs(d).sum()
    if exact:
        # One sign may stay fixed: the other half mirrors it.
        sums = d[:1]
        for value in d[1:]:
            sums = np.concatenate([sums + value, sums - value])
        p = float((np.abs(sums) >= reached).mean())
    else:
        signs = np.random.default_rng(seed).integers(0, 2, size=(_DRAWS, d.size), dtype=np.int8) * 2 - 1
        p = (1 + int((np.abs(signs @ d) >= reached).sum())) / (1 + _DRAWS)
    return SignFlip(p=p, **result)


def paired_t(differences: npt.ArrayLike) -> tuple[float, float]:
    """(p of the paired t-test, p of the Shapiro-Wilk test of its assumption); NaN where there is none.

    A small second number says that the first cannot be trusted; with fewer than 8 seeds a large one says little.
    """
    d = vector(differences, "differences")
    if d.size < 2 or np.isnan(d).any():
        return math.nan, math.nan
    if not _varies(d):
        return (1.0 if d[0] == 0 else math.nan), math.nan
    normal = float(scipy.stats.shapiro(d).pvalue) if d.size > 2 else math.nan
    return float(scipy.stats.ttest_1samp(d, 0.0).pvalue), normal


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for a family of tests (Holm 1979): max_{j<=i} min(1, (m-j+1) p_(j)), in the order given.

    NaN is no test: it stays NaN and does not count.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = vector(p_values, "p_values")
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]
    factors = np.arange(order.size, 0, -1)
    adjusted = np.full(p.size, np.nan)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, factors * p[order]))
    return [float(value) for value in adjusted]


def effect_size(differences: npt.ArrayLike) -> float:
    """d_z = mean(d)/sd(d) of paired differences (Cohen 1988); NaN for fewer than 2 or without spread."""
    d = vector(differences, "differences")
    return float(d.mean() / d.std(ddof=1)) if d.size > 1 and _varies(d) else math.nan


def order_sensitivity(average: Sequence[npt.ArrayLike]) -> float:
    """E22: standard deviation over domain orders of ACC; 0 = the order does not matter. NaN for fewer than 3 orders.

    Args:
        average: ACC per order: one number each, or the numbers of all seeds, which are averaged first.
    """
    per_order = np.array([float(np.mean(np.asarray(values, dtype=np.float64))) for values in average])
    return float(per_order.std(ddof=1)) if per_order.size >= 3 else math.nan
