"""Hierarchical bootstrap: seeds first, then examples within a domain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.stats

from residency.metrics.statistics import FloatArray, Interval

__all__ = ["bootstrap_interval", "bootstrap_replicates"]

Examples = Sequence[Sequence[npt.ArrayLike]]
# Numbers that are drawn at once; a bound on memory, without effect on the result.
_CHUNK = 1 << 21
_BCA_SEEDS = 8


def bootstrap_interval(
    scores: Examples,
    *,
    weights: Examples | None = None,
    level: float = 0.95,
    replicates: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval of the mean over seeds of the mean over domains of the mean over examples.

    Each replicate draws n seeds with replacement, and for every seed that it drew the examples of each domain with
    replacement. Whatever is linear in per-example scores can be put in: scores after the last stage (ACC), their
    differences from those after training on the domain (BWT), or differences between two methods, paired by seed.

    Percentile ends; from 8 seeds on BCa (Efron 1987), whose acceleration is the jackknife over seeds. One seed gives
    the interval of that run alone: the method's name stays, n says 1.

    Args:
        scores: `scores[s][j]` is the (n_j,) array of seed s on domain j; all seeds have the same domains.
        weights: Of the examples, in the same form (`tokens` for `nll`); `None` = equal.
        level: Coverage.
        replicates: Number of draws; the cost is replicates × all examples.
        seed: Of the draws: an own generator, nothing global is read or changed.
    """
    groups = _prepared(scores, weights)
    estimates = np.array([np.mean([_mean(x, w) for x, w in seed_groups]) for seed_groups in groups])
    estimate, n = float(estimates.mean()), len(groups)
    bca = n >= _BCA_SEEDS
    names: dict[str, Any] = {"level": level, "method": "BCa" if bca else "percentile", "n": n}
    if math.isnan(estimate):
        return Interval(estimate=estimate, low=math.nan, high=math.nan, **names)
    draws = bootstrap_replicates(scores, weights=weights, replicates=replicates, seed=seed)
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if bca:
        tails = _bca_tails(tails, draws, estimates)
    low, high = (float(q) for q in np.quantile(draws, tails))
    return Interval(estimate=estimate, low=low, high=high, **names)


def bootstrap_replicates(
    scores: Examples, *, weights: Examples | None = None, replicates: int = 10_000, seed: int = 0
) -> FloatArray:
    """The (replicates,) bootstrap distribution behind `bootstrap_interval`, with the same arguments."""
    groups = _prepared(scores, weights)
    generator = np.random.default_rng(seed)
    # How often replicate r drew seed s: the order of the draws does not matter to a mean.
    counts = generator.multinomial(len(groups), [1 / len(groups)] * len(groups), size=replicates)
    total = np.zeros(replicates)
    for seed_groups, count in zip(groups, counts.T, strict=True):
        owners = np.repeat(np.arange(replicates), count)
        for x, w in seed_groups:
            found = np.concatenate(list(_resampled_means(x, w, owners.size, generator)) or [np.zeros(0)])
            total += np.bincount(owners, found, minlength=replicates) / len(seed_groups)
    return total / len(groups)


def _prepared(scores: Examples, weights: Examples | None) -> list[list[tuple[FloatArray, FloatArray | None]]]:
    """[seed][domain] -> (values, weights); what cannot change a mean by being drawn again is left as it is."""
    domains = {len(seed_scores) for seed_scores in scores}
    if len(domains) != 1 or domains == {0}:
        raise ValueError(f"the seeds have {sorted(domains)} domains: give every seed the same ones, at least one")
    groups: list[list[tuple[FloatArray, FloatArray | None]]] = []
    for s, seed_scores in enumerate(scores):
        groups.append([])
        for j, values in enumerate(seed_scores):
            x = np.asarray(values, dtype=np.float64)
            w = None if weights is None else np.asarray(weights[s][j], dtype=np.float64)
            if x.ndim != 1 or x.size == 0 or (w is not None and w.shape != x.shape):
                raise ValueError(f"seed {s}, domain {j}: give a non-empty (n,) array of scores, and weights like it")
            groups[-1].append((x, w))
    return groups


def _mean(x: FloatArray, w: FloatArray | None) -> float:
    return float(np.average(x, weights=w))


def _resampled_means(
    x: FloatArray, w: FloatArray | None, size: int, generator: np.random.Generator
) -> Iterator[FloatArray]:
    """`size` means of x drawn with replacement, in pieces."""
    distinct, counts = np.unique(x, return_counts=True)
    if w is None and distinct.size <= 8:
        # Right or wrong: how often each value is drawn is multinomial, which costs nothing per example.
        yield generator.multinomial(x.size, counts / x.size, size=size) @ distinct / x.size
        return
    step = max(1, _CHUNK // x.size)
    for first in range(0, size, step):
        rows = min(step, size - first)
        drawn = generator.integers(0, x.size, size=(rows, x.size), dtype=np.int32)
        yield x[drawn].mean(1) if w is None else (w * x)[drawn].sum(1) / w[drawn].sum(1)


def _bca_tails(tails: FloatArray, draws: FloatArray, estimates: FloatArray) -> FloatArray:
    """Levels corrected for bias and acceleration (Efron 1987, equations 2.3, 6.6); as they are without spread."""
    estimate, n = estimates.mean(), len(estimates)
    share = float((draws < estimate).mean() + (draws == estimate).mean() / 2)
    left_out = (estimates.sum() - estimates) / (n - 1)
    deviation = left_out.mean() - left_out
    spread = float((deviation**2).sum())
    if spread == 0 or share in (0.0, 1.0):
        return tails
    acceleration = float((deviation**3).sum()) / (6 * spread**1.5)
    bias = scipy.stats.norm.ppf(share)
    z = bias + scipy.stats.norm.ppf(tails)
    return np.asarray(scipy.stats.norm.cdf(bias + z / (1 - acceleration * z)), dtype=np.float64)
