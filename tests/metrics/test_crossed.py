"""The crossed interval: closed forms, and its coverage in simulations of seeds and rows that are both random."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from residency.metrics.crossed import crossed, influence


def test_seeds_alone_are_students_t() -> None:
    d = [1.46, 1.97, 2.54]
    found = crossed(d)
    wanted = scipy.stats.ttest_1samp(d, 0.0)
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval()))
    assert found.p == pytest.approx(wanted.pvalue)
    assert (found.basis, found.rows) == ("seeds", 0)
    assert math.isnan(found.noise_floor)


def test_one_seed_is_students_t_over_its_rows_and_says_so() -> None:
    x = np.random.default_rng(0).normal(0.3, 1, 25)
    found = crossed([x.mean()], [{"law": x}])
    wanted = scipy.stats.ttest_1samp(x, 0.0)
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval()))
    assert (found.basis, found.seeds, found.rows) == ("rows", 1, 25)
    assert found.noise_floor == pytest.approx((found.high - found.low) / 2)


def test_one_seed_without_rows_has_no_interval() -> None:
    found = crossed([0.3])
    assert found.basis == "none"
    assert math.isnan(found.low)
    assert math.isnan(found.p)


def test_the_variance_is_that_of_the_two_way_layout() -> None:
    """Against the mean squares of statsmodels' analysis of variance of the same cells."""
    pandas = pytest.importorskip("pandas")
    formula, anova = (pytest.importorskip(f"statsmodels.{name}") for name in ("formula.api", "stats.anova"))
    rng = np.random.default_rng(3)
    x = rng.normal(0, 1, (5, 1)) + rng.normal(0, 2, (1, 12)) + rng.normal(0, 0.5, (5, 12))
    cells = pandas.DataFrame([{"y": x[s, r], "s": s, "r": r} for s in range(5) for r in range(12)])
    table = anova.anova_lm(formula.ols("y ~ C(s) + C(r)", cells).fit())
    squares, free = table["mean_sq"], table["df"]
    variance = (squares["C(s)"] + squares["C(r)"] - squares["Residual"]) / x.size
    df = (variance * x.size) ** 2 / sum(squares[k] ** 2 / free[k] for k in squares.index)
    found = crossed(x.mean(1), [{"law": row} for row in x])
    assert found.df == pytest.approx(df)
    assert (found.high - found.low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, df) * math.sqrt(variance))


def test_more_seeds_do_not_make_the_noise_of_rows_smaller() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 1, 20)
    widths = []
    for seeds in (3, 30, 300):
        x = rows + rng.normal(0, 0.3, (seeds, 20))
        found = crossed(x.mean(1), [{"law": row} for row in x])
        widths.append(found.high - found.low)
    floor = 2 * scipy.stats.t.ppf(0.975, 19) * rows.std(ddof=1) / math.sqrt(20)
    assert widths[-1] == pytest.approx(floor, rel=0.05)


def test_contributions_of_weighted_rows_have_the_weighted_mean() -> None:
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=30), rng.integers(1, 9, 30)
    assert influence(x, w, share=0.25).mean() == pytest.approx(0.25 * np.average(x, weights=w))
    # Its spread is that of the ratio: the jackknife, which deletes one row at a time, agrees to first order.
    jackknife = [np.average(np.delete(x, i), weights=np.delete(w, i)) for i in range(30)]
    error = math.sqrt(29 / 30 * ((np.array(jackknife) - np.mean(jackknife)) ** 2).sum())
    assert influence(x, w).std(ddof=1) / math.sqrt(30) == pytest.approx(error, rel=0.1)


def test_other_rows_for_another_seed_are_refused() -> None:
    with pytest.raises(ValueError, match="the same rows"):
        crossed([0.0, 1.0], [{"law": np.zeros(3)}, {"law": np.zeros(4)}])


def test_no_spread_at_all_gives_no_p() -> None:
    assert math.isnan(crossed([0.5, 0.5, 0.5]).p)
    assert crossed([0.0, 0.0, 0.0]).p == 1.0


def coverage(seeds: int, *, by_seed: float, by_row: float, noise: float, repetitions: int) -> float:
    """Share of intervals that hold the truth, of two domains with 40 rows each."""
    rng, hits = np.random.default_rng(seeds), 0
    for _ in range(repetitions):
        shift = rng.normal(0, by_seed, seeds)
        x = (shift[:, None, None] + rng.normal(0, by_row, (2, 40)) + rng.normal(0, noise, (seeds, 2, 40))) / 2
        found = crossed(x.mean(2).sum(1), [{"law": own[0], "code": own[1]} for own in x])
        # Of one seed the interval speaks for other rows under this seed, not for other seeds.
        truth = shift[0] if seeds == 1 else 0.0
        hits += found.low <= truth <= found.high
        assert found.basis == ("rows" if seeds == 1 else "seeds and rows")
    return hits / repetitions


@pytest.mark.parametrize("seeds", [1, 3, 6, 10])
def test_the_interval_covers_the_truth(seeds: int) -> None:
    # 1200 repetitions have a standard error of 0.6 points.
    assert 0.93 <= coverage(seeds, by_seed=0.05, by_row=0.5, noise=0.5, repetitions=1200) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3, 6, 10])
@pytest.mark.parametrize(
    "effects", [(0.05, 0.5, 0.5), (0.2, 0.3, 1.0), (0.0, 0.5, 0.5), (0.1, 0.0, 0.5), (0.05, 0.3, 0.2)]
)
def test_the_interval_covers_the_truth_whatever_varies(seeds: int, effects: tuple[float, float, float]) -> None:
    by_seed, by_row, noise = effects
    assert 0.93 <= coverage(seeds, by_seed=by_seed, by_row=by_row, noise=noise, repetitions=5000) <= 0.97
