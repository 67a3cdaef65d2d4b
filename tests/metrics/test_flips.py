"""Paired changes of the same rows."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from residency.metrics.flips import flip_rates, paired_change


def test_flips_by_hand() -> None:
    """One of four wrong that was right, two right that were wrong: a change of .25."""
    change = paired_change([1, 1, 0, 0], [0, 1, 1, 1], higher_is_better=True)
    assert (change.worse, change.better, change.change, change.n) == (0.25, 0.5, 0.25, 4)
    assert change.regressed == (0,)
    assert change.after - change.before == pytest.approx(change.better - change.worse)


def test_mcnemar_of_eight_and_two() -> None:
    before, after = [0] * 8 + [1] * 2 + [1] * 5, [1] * 8 + [0] * 2 + [1] * 5
    change = paired_change(before, after, higher_is_better=True)
    assert change.test == "mcnemar"
    assert change.p == pytest.approx(0.109375)
    assert change.p == pytest.approx(scipy.stats.binomtest(2, 10).pvalue)


def test_a_change_of_nothing_may_hide_flips_both_ways() -> None:
    change = paired_change([1, 0] * 10, [0, 1] * 10, higher_is_better=True)
    assert (change.change, change.worse, change.better, change.p) == (0.0, 0.5, 0.5, 1.0)


def test_losses_are_weighted_and_turned_round() -> None:
    change = paired_change([1.0, 2.0, 3.0], [1.5, 1.0, 4.5], higher_is_better=False, weights=[1, 1, 2])
    assert (change.before, change.after) == (pytest.approx(2.25), pytest.approx(2.875))
    assert change.regressed == (2, 0), "the largest loss first"
    assert (change.worse, change.better) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


@pytest.mark.parametrize("rows", [200, 2000])
def test_the_interval_covers_and_the_tests_agree(rows: int) -> None:
    draw = np.random.default_rng(rows)
    before = draw.normal(size=rows)
    after = before + 0.2 + 0.5 * draw.normal(size=rows)
    change = paired_change(before, after, higher_is_better=True)
    assert change.test == ("sign_flip" if rows < 1000 else "paired_t")
    half = 1.96 * (after - before).std() / rows**0.5
    assert change.low == pytest.approx(change.change - half, abs=0.15 * half)
    assert change.high == pytest.approx(change.change + half, abs=0.15 * half)
    assert change.p < 0.001


def test_refusals() -> None:
    with pytest.raises(ValueError, match="same rows"):
        paired_change([1], [1, 0], higher_is_better=True)
    with pytest.raises(ValueError, match="at least one"):
        paired_change([], [], higher_is_better=True)


# -- flip rates over seeds --------------------------------------------------------------------------------------------


def test_flip_rates_are_means_over_domains_and_their_difference_is_the_change() -> None:
    before = {"a": [1, 1, 0, 0], "b": [1, 0]}
    after = {"a": [0, 1, 1, 1], "b": [1, 1]}
    found = flip_rates([(before, after), (before, before)])
    assert found.lost.estimate == pytest.approx((0.25 + 0) / 2 / 2)
    assert found.gained.estimate == pytest.approx((0.5 + 0.5) / 2 / 2)
    change = np.mean([np.mean(after["a"]) - np.mean(before["a"]), np.mean(after["b"]) - np.mean(before["b"])]) / 2
    assert found.gained.estimate - found.lost.estimate == pytest.approx(change)
    assert found.p == (pytest.approx(scipy.stats.binomtest(1, 4).pvalue), 1.0)


@pytest.mark.parametrize("seeds", [1, 3, 8])
def test_intervals_of_flip_rates_cover_also_where_rows_are_shared(seeds: int) -> None:
    """Rows flip with a chance of their own, the same under all seeds: nested resampling would be too sure of it."""
    hits, trials = 0, 300
    for trial in range(trials):
        draw = np.random.default_rng(trial)
        chance = draw.beta(2, 2, size=120)
        pairs = [({"a": np.ones(120)}, {"a": (draw.random(120) >= chance).astype(float)}) for _ in range(seeds)]
        found = flip_rates(pairs).lost
        hits += found.low <= 0.5 <= found.high
    assert 0.91 <= hits / trials <= 0.985
