"""The interval of a mean over seeds and test rows that are crossed: every seed is scored on the same rows.

Model of a (paired) score: x[s, r] = mean + a[s] + b[r] + e[s, r] with independent random effects of seed s and of
row r inside its domain. Both are a sample: another seed shifts all rows, another row is shifted in all seeds. So more
seeds do not make the rows' part smaller, which a bootstrap that nests rows in seeds gets wrong.

Variance of the mean by the method of moments (Cornfield and Tukey 1956), degrees of freedom by Satterthwaite (1946),
together the quasi-F of Clark (1973):

    V = V_seeds + V_rows - V_rest      V_seeds = var_s(mean_r x)/S      V_rows = var_r(mean_s x)/R
    V_rest = var(x - row mean - seed mean + mean)/(S R)                 t = mean/√V
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.stats

__all__ = ["Basis", "Crossed", "Parts", "crossed", "influence"]

FloatArray = npt.NDArray[np.float64]
Parts = Mapping[str, FloatArray]
"""Domain -> (R,) contributions of its rows: their means over rows, summed over domains, are the score of one seed."""
Basis = Literal["seeds and rows", "seeds", "rows", "none"]
"""What an interval speaks for: other seeds and other test rows, other seeds on these rows, other rows for this seed."""

_RELATIVE = 1e-12  # variation below this share of the values is rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossed:
    """A mean with its interval and test against 0.

    Args:
        estimate: Mean over seeds.
        low: Lower end of the interval, NaN where the data give none.
        high: Upper end.
        p: Two-sided p of mean = 0; NaN where there is no interval.
        df: Degrees of freedom of the t distribution.
        basis: What the interval speaks for.
        seeds: Number of seeds.
        rows: Number of test rows, 0 where they are not known.
        noise_floor: Half-width of the interval that the choice of test rows alone causes; NaN if they are not known.
    """

    estimate: float
    low: float
    high: float
    p: float
    df: float
    basis: Basis
    seeds: int
    rows: int
    noise_floor: float


@dataclass(frozen=True, slots=True)
class _Variance:
    """An estimated variance and its degrees of freedom."""

    value: float
    df: float


def influence(values: npt.ArrayLike, weights: npt.ArrayLike | None = None, *, share: float = 1.0) -> FloatArray:
    """(R,) contributions whose plain mean is share · Σ w x / Σ w, linearised where the weights are random too.

    Args:
        values: (R,) scores of the rows.
        weights: (R,) weights, such as tokens; `None` = equal.
        share: Of the domain in the score, 1/T for a mean over T domains.
    """
    x = np.asarray(values, dtype=np.float64)
    if weights is None:
        return share * x
    w = np.asarray(weights, dtype=np.float64)
    mean = float(np.average(x, weights=w))
    return np.asarray(share * (mean + w / w.mean() * (x - mean)), dtype=np.float64)


def crossed(scores: npt.ArrayLike, parts: Sequence[Parts] | None = None, *, level: float = 0.95) -> Crossed:
    """Mean of one score per seed, its interval, and the p of the hypothesis that it is 0.

    With rows, the interval speaks for new seeds and new rows; without, for new seeds on the same rows. One seed with
    rows gives an interval for other rows only, one seed without gives none: `basis` says which.

    Args:
        scores: (S,) one score per seed, already paired where it is a difference.
        parts: Per seed the contributions of rows (see `Parts`), rows in the same order for every seed; `None` where a
            seed has none. A domain that a seed lacks contributes 0 to it.
        level: Coverage.

    Raises:
        ValueError: The seeds were scored on different rows, or there is no seed.
    """
    y = np.asarray(scores, dtype=np.float64)
    if y.ndim != 1 or y.size == 0 or (parts is not None and len(parts) != y.size):
        raise ValueError(f"scores have shape {y.shape}: give (S,) scores, S >= 1, and as many parts")
    estimate = float(y.mean())
    tables = [] if parts is None else _tables(parts)
    rows = sum(table.shape[1] for table in tables)
    by_rows = _over_rows(tables)
    floor = math.nan if by_rows is None else _reach(by_rows, level)
    total, basis = _total(y, tables, by_rows)
    found: dict[str, Any] = {"estimate": estimate, "seeds": y.size, "rows": rows, "noise_floor": floor, "basis": basis}
    if total is None or math.isnan(estimate):
        return Crossed(low=math.nan, high=math.nan, p=math.nan, df=math.nan, **found)
    half, p = _reach(total, level), _p(estimate, total)
    return Crossed(low=estimate - half, high=estimate + half, p=p, df=total.df, **found)


def _tables(parts: Sequence[Parts]) -> list[FloatArray]:
    """Per domain the (S, R) contributions."""
    tables = []
    for name in dict.fromkeys(name for own in parts for name in own):
        sizes = {np.asarray(own[name]).shape for own in parts if name in own}
        if len(sizes) != 1 or len(next(iter(sizes))) != 1:
            raise ValueError(f"{name}: the seeds have rows of shapes {sorted(sizes)}: give all seeds the same rows")
        empty = np.zeros(next(iter(sizes)))
        tables.append(np.stack([np.asarray(own.get(name, empty), dtype=np.float64) for own in parts]))
    return tables


def _total(y: FloatArray, tables: Sequence[FloatArray], rows: _Variance | None) -> tuple[_Variance | None, Basis]:
    """The variance of the mean, and what it speaks for."""
    if y.size == 1:
        return rows, "rows" if rows is not None else "none"
    seeds = _Variance(float(y.var(ddof=1)) / y.size, y.size - 1.0)
    if rows is None:
        return seeds, "seeds"
    rest = _rest(tables)
    # An estimated component below 0 is 0: the total is never less than what seeds or rows give by themselves.
    value = max(seeds.value + rows.value - rest.value, seeds.value, rows.value)
    terms = [seeds, rows, rest]
    spread = sum(term.value**2 / term.df for term in terms if term.value)
    return _Variance(value, value**2 / spread if spread else math.inf), "seeds and rows"


def _over_rows(tables: Sequence[FloatArray]) -> _Variance | None:
    """Variance of the mean by rows, which are drawn inside their domains; `None` where a domain has fewer than 2."""
    if not tables or any(table.shape[1] < 2 for table in tables):
        return None
    return _sum([_Variance(_variance(t.mean(0)) / t.shape[1], t.shape[1] - 1.0) for t in tables])


def _rest(tables: Sequence[FloatArray]) -> _Variance:
    found = []
    for x in tables:
        seeds, rows = x.shape
        free = (seeds - 1.0) * (rows - 1.0)
        residual = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
        found.append(_Variance(float((residual**2).sum()) / free / (seeds * rows), free))
    return _sum(found)


def _sum(terms: Sequence[_Variance]) -> _Variance:
    value = math.fsum(term.value for term in terms)
    spread = math.fsum(term.value**2 / term.df for term in terms)
    return _Variance(value, value**2 / spread if spread else math.inf)


def _variance(x: FloatArray) -> float:
    return float(x.var(ddof=1)) if np.ptp(x) > _RELATIVE * np.abs(x).max(initial=0.0) else 0.0


def _reach(variance: _Variance, level: float) -> float:
    return float(scipy.stats.t.ppf((1 + level) / 2, variance.df)) * math.sqrt(variance.value)


def _p(estimate: float, variance: _Variance) -> float:
    """Without any variation nothing can be said about chance: 1 for a mean of 0, else NaN."""
    if math.sqrt(variance.value) <= _RELATIVE * abs(estimate):
        return 1.0 if estimate == 0 else math.nan
    return float(2 * scipy.stats.t.sf(abs(estimate) / math.sqrt(variance.value), variance.df))
