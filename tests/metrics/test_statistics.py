"""Statistics over seeds against fixture F7, scipy, statsmodels and what identical methods must give."""

from __future__ import annotations

import doctest
import math
from itertools import product

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats import contingency_tables, multitest

from residency.metrics import example_level, statistics
from residency.metrics.example_level import mcnemar
from residency.metrics.statistics import (
    effect_size,
    holm,
    iqm,
    order_sensitivity,
    paired_t,
    probability_of_improvement,
    sign_flip,
    smallest_p,
    t_interval,
)

nan = math.nan


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("module", [statistics, example_level])
def test_documented_examples(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


# -- fixture F7 -------------------------------------------------------------------------------------------------------


def test_interval_of_three_seeds() -> None:
    interval = t_interval([1.46, 1.97, 2.54])
    assert interval.estimate == pytest.approx(1.99)
    assert np.std([1.46, 1.97, 2.54], ddof=1) == pytest.approx(0.540, abs=5e-4)
    assert interval.half_width == pytest.approx(1.342, abs=5e-4)
    assert (interval.n, interval.level, interval.method) == (3, 0.95, "t")


def test_sign_flip_of_the_fixture() -> None:
    assert sign_flip([1, 1, 1, 1, 1, 1]).p == 0.03125
    assert sign_flip([0.2, 0.5, 0.3]).p == 0.25
    assert holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "level"), [(2, 0.95), (5, 0.9), (12, 0.99)])
def test_t_interval_equals_scipy(n: int, level: float) -> None:
    x = draw(n, n)
    interval = t_interval(x, level=level)
    expected = scipy.stats.ttest_1samp(x, 0.0).confidence_interval(level)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_one_value_has_no_interval() -> None:
    interval = t_interval([0.5])
    assert interval.estimate == 0.5
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert math.isnan(t_interval([]).estimate)
    assert math.isnan(t_interval([0.5, nan, 0.7]).low)


# -- aggregates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 15, 40])
def test_iqm_is_scipys_trimmed_mean(n: int) -> None:
    x = draw(n, n)
    ordered = np.sort(x)[n // 4 : n - n // 4]
    assert iqm(x) == pytest.approx(ordered.mean(), rel=1e-12)
    assert iqm(x) == pytest.approx(scipy.stats.trim_mean(x, 0.25), rel=1e-12)
    if n < 4:
        assert iqm(x) == pytest.approx(x.mean())
    if n >= 4:
        x[x.argmax()] = 1e9
        assert iqm(x) < 1e6
    assert math.isnan(iqm([*x, nan]))


def test_probability_of_improvement_equals_mann_whitney() -> None:
    a, b = draw(1, 6, 3).round(1), draw(2, 5, 3).round(1)
    per_domain = [scipy.stats.mannwhitneyu(a[:, j], b[:, j]).statistic / 30 for j in range(3)]
    assert probability_of_improvement(a, b) == pytest.approx(np.mean(per_domain), rel=1e-12)
    assert probability_of_improvement(a, b) + probability_of_improvement(b, a) == pytest.approx(1.0)
    assert probability_of_improvement(a, a) == 0.5
    assert probability_of_improvement([1, 1], [0, 0, 0]) == 1.0
    assert math.isnan(probability_of_improvement([1, nan], [0]))
    with pytest.raises(ValueError, match="domains"):
        probability_of_improvement(a, b[:, :2])


def test_order_sensitivity() -> None:
    assert order_sensitivity([75.4, 75.7, 76.3]) == pytest.approx(np.std([75.4, 75.7, 76.3], ddof=1))
    assert order_sensitivity([[1, 3], [4], [3, 3, 3]]) == pytest.approx(1.0)
    assert order_sensitivity([7.0, 7.0, 7.0]) == 0.0
    assert math.isnan(order_sensitivity([1.0, 2.0]))
    assert math.isnan(order_sensitivity([1.0, 2.0, nan]))


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 6, 8])
def test_sign_flip_equals_scipys_exact_permutation_test(n: int) -> None:
    for d in (draw(n, n), draw(n + 50, n) + 1, np.round(draw(n + 99, n))):
        expected = scipy.stats.permutation_test(
            (d,), lambda x, axis: x.sum(axis), permutation_type="samples", n_resamples=np.inf, vectorized=True
        )
        # scipy doubles the smaller tail, which is the same: the distribution is symmetric.
        assert sign_flip(d).p == pytest.approx(min(1.0, expected.pvalue), rel=1e-12)


def test_sign_flip_counts_every_pattern() -> None:
    d = np.array([0.1, 0.2, 0.3, -0.3])
    sums = [abs(np.dot(signs, d)) for signs in product((1, -1), repeat=4)]
    assert sign_flip(d).p == np.mean([s >= 0.3 - 1e-12 for s in sums])


@pytest.mark.parametrize(("n", "p"), [(1, 1.0), (3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_the_smallest_p_is_reached_by_equal_signs_whatever_the_sizes(n: int, p: float) -> None:
    assert smallest_p(n) == p
    for sign in (1, -1):
        result = sign_flip(sign * (np.abs(draw(n, n)) + 0.1))
        assert (result.p, result.smallest_p, result.n, result.exact) == (p, p, n, True)


def test_zero_differences_cannot_help() -> None:
    assert sign_flip([1.0, 2.0, 3.0, 0.0, 0.0, 0.0]).p == 0.25
    assert sign_flip([1.0, 2.0, 3.0, 0.0, 0.0, 0.0]).smallest_p == 0.25


def test_identical_methods() -> None:
    result = sign_flip(np.zeros(8))
    assert (result.p, result.smallest_p) == (1.0, 1.0)
    assert paired_t(np.zeros(8))[0] == 1.0
    assert math.isnan(effect_size(np.zeros(8)))


def test_many_pairs_are_drawn() -> None:
    d = draw(3, 30) + 0.35
    drawn, again, other = sign_flip(d), sign_flip(d), sign_flip(d, seed=1)
    assert not drawn.exact
    assert drawn == again
    assert drawn.p != other.p
    assert drawn.p == pytest.approx(scipy.stats.ttest_1samp(d, 0).pvalue, abs=0.01)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    sign_flip(d)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


def test_a_missing_seed_is_not_dropped() -> None:
    assert math.isnan(sign_flip([1.0, nan]).p)
    assert math.isnan(paired_t([1.0, 2.0, nan])[0])
    assert math.isnan(effect_size([1.0, 2.0, nan]))
    with pytest.raises(ValueError, match="one number per seed"):
        sign_flip([[1.0, 2.0]])


def test_paired_t_equals_scipy() -> None:
    a, b = draw(5, 9), draw(6, 9)
    p, normal = paired_t(a - b)
    assert p == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)
    assert normal == pytest.approx(scipy.stats.shapiro(a - b).pvalue)
    assert effect_size(a - b) == pytest.approx(scipy.stats.ttest_rel(a, b).statistic / 3)
    assert math.isnan(paired_t([0.5])[0])
    # Equal up to rounding: an effect of 10^16 standard deviations would be an artefact.
    assert math.isnan(paired_t([0.8 - 0.5, 0.9 - 0.6])[0])
    assert math.isnan(effect_size([0.8 - 0.5, 0.9 - 0.6]))
    assert math.isnan(paired_t([0.5, 0.7])[1])


@pytest.mark.parametrize("m", [1, 2, 5, 9])
def test_holm_equals_statsmodels(m: int) -> None:
    p = np.random.default_rng(m).uniform(0, 0.4, m).round(2).tolist()
    assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1].tolist(), rel=1e-12)


def test_holm_leaves_out_what_was_not_tested() -> None:
    adjusted = holm([0.01, nan, 0.04])
    assert math.isnan(adjusted[1])
    assert [adjusted[0], adjusted[2]] == holm([0.01, 0.04])
    assert holm([]) == []


def test_mcnemar_equals_statsmodels() -> None:
    a, b = (np.random.default_rng(s).integers(0, 2, 60) for s in (0, 1))
    table = [[int(((a == i) & (b == j)).sum()) for j in (0, 1)] for i in (0, 1)]
    assert mcnemar(a, b) == pytest.approx(contingency_tables.mcnemar(table, exact=True).pvalue)
    assert mcnemar(a, a) == 1.0
    with pytest.raises(ValueError, match="same examples"):
        mcnemar(a, b[:-1])
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar(a, b / 2)
