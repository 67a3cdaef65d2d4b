"""The hierarchical bootstrap: coverage, agreement with scipy, both levels of chance, own generator."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from residency.metrics.bootstrap import bootstrap_interval, bootstrap_replicates

Scores = list[list[np.ndarray]]


def runs(seed: int, *, seeds: int, domains: int = 2, examples: int = 30, spread: float = 1.0) -> Scores:
    """Gaussian scores around 0, with a shift per seed and noise per example."""
    draw = np.random.default_rng(seed)
    shifts = spread * draw.normal(size=seeds)
    return [[shift + draw.normal(size=examples) for _ in range(domains)] for shift in shifts]


def test_estimate_is_the_mean_of_means() -> None:
    scores: Scores = [[np.array([1.0, 2.0]), np.array([4.0])], [np.array([0.0]), np.array([3.0, 3.0, 6.0])]]
    assert bootstrap_interval(scores, replicates=50).estimate == pytest.approx(((1.5 + 4) / 2 + (0 + 4) / 2) / 2)
    weights: Scores = [[np.array([3.0, 1.0]), np.array([1.0])], [np.array([2.0]), np.array([1.0, 1.0, 2.0])]]
    weighted = bootstrap_interval(scores, weights=weights, replicates=50)
    assert weighted.estimate == pytest.approx(((1.25 + 4) / 2 + (0 + 4.5) / 2) / 2)


@pytest.mark.parametrize(("seeds", "method"), [(5, "percentile"), (8, "BCa"), (12, "BCa")])
def test_seeds_alone_agree_with_scipy(seeds: int, method: str) -> None:
    """One example per seed leaves the ordinary bootstrap of the mean."""
    values = np.random.default_rng(seeds).exponential(size=seeds)
    ours = bootstrap_interval([[np.array([v])] for v in values], replicates=40_000)
    scipys = scipy.stats.bootstrap((values,), np.mean, n_resamples=40_000, method=method, rng=0).confidence_interval
    assert (ours.method, ours.n) == (method, seeds)
    assert (ours.low, ours.high) == pytest.approx((scipys.low, scipys.high), abs=0.03 * values.std())


@pytest.mark.parametrize("weighted", [False, True])
def test_variance_of_the_replicates_has_both_levels(weighted: bool) -> None:
    """Seeds: population variance of their means / n. Examples: within-variance / n_j / domains / n."""
    scores = runs(1, seeds=4, domains=3, examples=20)
    means = np.array([np.mean([x.mean() for x in seed]) for seed in scores])
    within = np.mean([np.mean([x.var() / x.size for x in seed]) / len(seed) for seed in scores])
    expected = (means.var() + within) / len(scores)
    ones: Scores | None = [[np.ones(20)] * 3] * 4 if weighted else None
    draws = bootstrap_replicates(scores, weights=ones, replicates=20_000)
    assert draws.mean() == pytest.approx(means.mean(), abs=4 * math.sqrt(expected / 20_000))
    assert draws.var() == pytest.approx(expected, rel=0.05)


def test_right_and_wrong_answers_take_the_short_way_to_the_same_distribution() -> None:
    right = [[(np.random.default_rng(s).uniform(size=40) < 0.7).astype(float)] for s in range(3)]
    short = bootstrap_replicates(right, replicates=20_000)
    # Weights of 1 force the general way.
    general = bootstrap_replicates(right, weights=[[np.ones(40)]] * 3, replicates=20_000)
    assert np.quantile(short, [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(general, [0.1, 0.5, 0.9]), abs=0.013)
    assert short.std() == pytest.approx(general.std(), rel=0.03)


def test_coverage_of_gaussian_data() -> None:
    """About 95 %; a percentile interval of 20 seeds is known to be a little short."""
    hits = []
    for trial in range(400):
        values = np.random.default_rng(trial).normal(size=20)
        interval = bootstrap_interval([[np.array([v])] for v in values], replicates=800, seed=trial)
        hits.append(interval.low <= 0 <= interval.high)
    assert 0.90 <= np.mean(hits) <= 0.98


def test_coverage_of_examples_in_one_run() -> None:
    """With one seed the interval speaks of the run: it covers the mean of the population of examples."""
    hits = []
    for trial in range(300):
        examples = np.random.default_rng(trial).normal(size=60)
        interval = bootstrap_interval([[examples]], replicates=600, seed=trial)
        hits.append(interval.low <= 0 <= interval.high)
    assert 0.91 <= np.mean(hits) <= 0.98


def test_own_generator() -> None:
    scores = runs(2, seeds=3)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    first = bootstrap_interval(scores, replicates=500)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]
    np.random.seed(6)
    assert bootstrap_interval(scores, replicates=500) == first
    assert bootstrap_interval(scores, replicates=500, seed=1) != first


def test_identical_methods_differ_by_nothing() -> None:
    zeros = [[np.zeros(10), np.zeros(5)] for _ in range(9)]
    interval = bootstrap_interval(zeros, replicates=100)
    assert (interval.estimate, interval.low, interval.high) == (0, 0, 0)


def test_missing_and_misshapen() -> None:
    scores = runs(3, seeds=2)
    scores[1][0][4] = np.nan
    interval = bootstrap_interval(scores, replicates=100)
    assert math.isnan(interval.estimate)
    assert math.isnan(interval.low)
    with pytest.raises(ValueError, match="same ones"):
        bootstrap_interval([scores[0], scores[1][:1]])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap_interval([[np.zeros(0)]])
