"""The score-matrix metrics against hand-made fixtures, identities, missing cells and wrong input."""

from __future__ import annotations

import doctest
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residency import metrics
from residency.metrics import definitions, matrix, variants
from residency.metrics.definitions import base
from residency.metrics.discovery import matrix_metrics, printed_sign

Options = dict[str, Any]
Metric = Callable[..., float]
Cells = Callable[[int, int], bool]
nan = math.nan

# F8 of the specification: a full matrix on which no two definitions agree.
F8 = [[20, 30, 76, 40], [80, 35, 30, 42], [70, 75, 74, 41], [85, 60, 70, 45], [75, 78, 55, 90]]
ALONE: Options = {"single": [82, 76, 80, 88]}
JOINT: Options = {"joint": [84, 80, 78, 89]}
ENDS: Options = {**JOINT, "random": [10, 20, 25, 30]}
IGNORE: Options = {"upper": "ignore"}


def diagonal(i: int, j: int) -> bool:
    return i == j


def ends(i: int, j: int, k: int = 4) -> bool:
    """First and last score of every domain but the newest of k."""
    return j < k and i in (j, k)


def column(i: int, j: int, k: int = 4) -> bool:
    """Every score since training, of every domain but the newest of k."""
    return j < k and j <= i <= k


# metric, options, value on F8, the cells (row i, domain j from 1) that it reads
TABLE: list[tuple[Metric, Options, float, Cells]] = [
    (metrics.average, {"after": 1}, 80, lambda i, j: i == 1 and j == 1),
    (metrics.average, {"after": 2}, 72.5, lambda i, j: i == 2 and j <= 2),
    (metrics.average, {"after": 3}, 71 + 2 / 3, lambda i, j: i == 3 and j <= 3),
    (metrics.average, {}, 74.5, lambda i, j: i == 4),
    (metrics.learning, {}, 78.75, diagonal),
    (metrics.anytime_average, {}, 74 + 2 / 3, lambda i, j: i >= j),
    (metrics.forgetting, {"after": 2}, 10, lambda i, j: column(i, j, 2)),
    (metrics.forgetting, {"after": 3}, 5, lambda i, j: column(i, j, 3)),
    (metrics.forgetting, {}, 7 + 1 / 3, column),
    (metrics.bwt, {"after": 2}, -10, lambda i, j: ends(i, j, 2)),
    (metrics.bwt, {"after": 3}, -5, lambda i, j: ends(i, j, 3)),
    (metrics.bwt, {}, -5 - 2 / 3, ends),
    (metrics.fwt, {}, 2 + 2 / 3, lambda i, j: j > 1 and i in (0, j - 1)),
    (metrics.relative_forgetting, {}, 7.892857, ends),
    (metrics.min_accuracy, {}, 61 + 2 / 3, lambda i, j: i > j),
    (metrics.worst_case_accuracy, {}, 68.75, lambda i, j: i > j or i == j == 4),
    (metrics.worst_case_accuracy, {"after": 1}, 80, lambda i, j: i == j == 1),
    (metrics.intransigence, JOINT, 4, diagonal),
    (metrics.plasticity, ALONE, 0.965045, diagonal),
    (metrics.stability, {}, 0.921071, ends),
    (metrics.stability_plasticity, ALONE, 0.942546, lambda i, j: i == j or ends(i, j)),
    (metrics.forgetting_first_last, {}, 5 + 2 / 3, ends),
    (metrics.forgetting_max_including_last, {}, 9 + 2 / 3, lambda i, j: i > 0 and j < 4),
    (metrics.forgetting_max_including_last, IGNORE, 8 + 1 / 3, column),
    (metrics.forgetting_max_all_previous, {}, 8 + 2 / 3, lambda i, j: i > 0 and j < 4),
    (metrics.forgetting_max_all_previous, IGNORE, 7 + 1 / 3, column),
    (metrics.forgetting_max_with_base, {}, 9 + 1 / 3, lambda i, j: j < 4),
    (metrics.forgetting_max_with_base, IGNORE, 9 + 1 / 3, lambda i, j: j < 4 and (i == 0 or i >= j)),
    (metrics.forgetting_skip_neighbour, {}, 2 / 3, lambda i, j: j < 3 and i in (j, 4)),
    (metrics.bwt_over_T, {}, -4.25, lambda i, j: i in (j, 4)),
    (metrics.bwt_triangle, {}, -6 - 1 / 6, column),
    (metrics.bwt_triangle_skip_neighbour, {}, 0.5, lambda i, j: j < 3 and (i == j or i >= j + 2)),
    (metrics.fwt_no_baseline, {}, 51 + 1 / 3, lambda i, j: i == j - 1 and i > 0),
    (metrics.fwt_triangle, {}, 44.5, lambda i, j: 0 < i < j),
    (metrics.fwt_vs_single, ALONE, -3, lambda i, j: i == j > 1),
    (metrics.fwt_vs_single, {**ALONE, "first": 1}, -2.75, diagonal),
    (metrics.fwt_diag_minus_constant, {}, 27.81, diagonal),
    (metrics.fr_joint_normalised, ENDS, -0.142992, lambda i, j: i == 4),
    (metrics.average_triangle, {}, 73.8, lambda i, j: i >= j),
]
RATIOS = (metrics.plasticity, metrics.stability, metrics.stability_plasticity)
SIZES = [(seed, size) for seed in range(5) for size in (2, 3, 6)]


def draw(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 99, (size + 1, size))


@pytest.mark.parametrize(("metric", "options", "value", "reads"), TABLE)
def test_full_matrix(metric: Metric, options: Options, value: float, reads: Cells) -> None:
    assert metric(F8, higher_is_better=True, **options) == pytest.approx(value, abs=5e-7)


@pytest.mark.parametrize(("metric", "options", "value", "reads"), TABLE)
@pytest.mark.parametrize("gap", [nan, math.inf, -math.inf])
def test_nan_exactly_when_a_missing_cell_is_read(
    metric: Metric, options: Options, value: float, reads: Cells, gap: float
) -> None:
    for row, domain in np.ndindex(5, 4):
        holed = np.array(F8, dtype=float)
        holed[row, domain] = gap
        result = metric(holed, higher_is_better=True, **options)
        if reads(row, domain + 1):
            assert math.isnan(result), (row, domain)
        else:
            assert result == metric(F8, higher_is_better=True, **options), (row, domain)


@pytest.mark.parametrize(("metric", "options", "value", "reads"), [row for row in TABLE if row[0] not in RATIOS])
def test_negating_scores_and_direction_changes_nothing(
    metric: Metric, options: Options, value: float, reads: Cells
) -> None:
    turned = {k: [-x for x in v] if isinstance(v, list) else v for k, v in options.items()}
    result = metric(-np.array(F8), higher_is_better=False, **turned)
    assert result == pytest.approx(metric(F8, higher_is_better=True, **options), abs=1e-12)


@pytest.mark.parametrize(("metric", "options", "value", "reads"), [row for row in TABLE if "after" not in row[1]])
def test_one_domain(metric: Metric, options: Options, value: float, reads: Cells) -> None:
    """F5: with one domain there is a level, but no forgetting and no transfer."""
    single = {k: v[:1] if isinstance(v, list) else v for k, v in options.items()}
    result = metric([[50.0], [70.0]], higher_is_better=True, **single)
    levels: dict[Metric, float] = {
        metrics.average: 70,
        metrics.learning: 70,
        metrics.anytime_average: 70,
        metrics.worst_case_accuracy: 70,
        metrics.average_triangle: 70,
        metrics.intransigence: 14,
        metrics.plasticity: 70 / 82,
        metrics.fwt_diag_minus_constant: 70 - 50.94,
        metrics.fr_joint_normalised: 60 / 74 - 1,
    }
    expected = -12 if options.get("first") == 1 else levels.get(metric, nan)
    assert result == pytest.approx(expected, nan_ok=True)


def test_no_number_where_none_is_meant() -> None:
    two = draw(0, 2)
    assert math.isnan(metrics.forgetting_skip_neighbour(two, higher_is_better=True))
    assert math.isnan(metrics.bwt_triangle_skip_neighbour(two, higher_is_better=True))
    tiny: list[list[float]] = [[0, 0], [5e-4, 0], [0, 1]]
    assert math.isnan(metrics.relative_forgetting(tiny, higher_is_better=True))
    assert metrics.relative_forgetting(tiny, higher_is_better=True, floor=5e-4) == 100.0
    zero = [[0, 0], [0, 0], [1, 1]]
    assert math.isnan(metrics.relative_forgetting(zero, higher_is_better=True, floor=0))
    assert math.isnan(metrics.stability(zero, higher_is_better=True))
    sour = np.array([[0, 0], [1, 0], [-0.5, 1]])
    assert math.isnan(metrics.stability_plasticity(sour, higher_is_better=True, single=[1, 1]))
    assert math.isnan(metrics.fr_joint_normalised(zero, higher_is_better=True, joint=[1, 5], random=[1, 0]))


def test_equal_scores() -> None:
    """F6: nothing moved."""
    R = np.full((4, 3), 42.0)
    expected = dict.fromkeys(("bwt", "forgetting", "fwt", "relative_forgetting"), 0.0)
    levels = ("average", "learning", "anytime_average", "min_accuracy", "worst_case_accuracy")
    expected |= dict.fromkeys(levels, 42.0) | {"stability": 1.0}
    assert metrics.summary(R, higher_is_better=True) == expected


def test_summary_is_the_functions_by_name() -> None:
    names = [name for name, metric in matrix_metrics().items() if metric.about.needs is None]
    expected = {name: getattr(matrix, name)(F8, higher_is_better=True) for name in names}
    assert {"average", "learning", "bwt", "forgetting", "fwt", "stability"} <= expected.keys()
    assert metrics.summary(F8, higher_is_better=True) == expected


@pytest.mark.parametrize(("seed", "size"), SIZES)
@pytest.mark.parametrize("falling", [True, False])
def test_forgetting_is_at_least_minus_bwt(seed: int, size: int, falling: bool) -> None:
    R = np.sort(draw(seed, size), axis=0)[::-1] if falling else draw(seed, size)
    forgetting, lost = metrics.forgetting(R, higher_is_better=True), -metrics.bwt(R, higher_is_better=True)
    best_is_first = all(R[j:size, j - 1].argmax() == 0 for j in range(1, size))
    assert forgetting >= lost
    assert (forgetting == lost) == best_is_first
    assert best_is_first or not falling
    assert metrics.forgetting_max_including_last(R, higher_is_better=True, upper="ignore") >= max(forgetting, 0)


@pytest.mark.parametrize(("seed", "size"), SIZES)
def test_identities(seed: int, size: int) -> None:
    R = draw(seed, size)
    was = metrics.summary(R, higher_is_better=True)
    assert was["average"] == pytest.approx(was["learning"] + (size - 1) / size * was["bwt"], rel=1e-13)
    lifted = metrics.summary(R + 17.5, higher_is_better=True)
    assert [lifted[k] for k in ("bwt", "forgetting", "fwt")] == pytest.approx(
        [was[k] for k in ("bwt", "forgetting", "fwt")], abs=1e-12
    )
    bits, nats = (metrics.relative_forgetting(R * unit, higher_is_better=False) for unit in (1, math.log(2)))
    assert bits == pytest.approx(nats, rel=1e-12)
    # Renaming the earlier domains moves rows and columns together; the newest one must stay the newest.
    order = np.append(np.random.default_rng(seed).permutation(size - 1), size - 1)
    moved = metrics.summary(R[np.append(0, order + 1)][:, order], higher_is_better=True)
    for name in ("average", "learning", "bwt", "relative_forgetting"):
        assert moved[name] == pytest.approx(was[name], rel=1e-12)


@pytest.mark.parametrize("metric", [metrics.average, metrics.bwt, metrics.forgetting, metrics.worst_case_accuracy])
@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_after_k_is_the_shorter_stream(metric: Metric, k: int) -> None:
    R = draw(3, 6)
    short = metric(R[: k + 1, :k], higher_is_better=True)
    assert metric(R, higher_is_better=True, after=k) == pytest.approx(short, nan_ok=True)


def test_missing_cells_are_listed_with_and_without_names() -> None:
    R: list[list[float | None]] = [[None, 0.1], [0.8, nan], [math.inf, 0.9]]
    assert metrics.missing_cells(R) == [(0, 0), (1, 1), (2, 0)]
    assert metrics.missing_cells(R, trained_only=True) == [(2, 0)]
    named = [("before training", "law"), ("law", "code"), ("code", "law")]
    assert metrics.missing_cells(R, ["law", "code"]) == named
    assert metrics.missing_cells(F8) == []
    with pytest.raises(ValueError, match="3 names for 4 columns"):
        metrics.missing_cells(F8, ["a", "b", "c"])


WRONG: list[tuple[Callable[..., Any], Any, Options, str]] = [
    *(
        (matrix.utility, np.zeros(shape), {}, r"shape \(.*row of NaN")
        for shape in [(3, 3), (5, 3), (3,), (1, 0), (3, 2, 1)]
    ),
    (metrics.summary, [[1], [1, 2], [1, 2]], {}, "rectangular table.*NaN or None"),
    (metrics.bwt, [["high"], ["low"]], {}, "rectangular table.*NaN or None"),
    (metrics.average, F8, {"after": 0}, "after=0 with 4 domains.*1 to 4"),
    (metrics.forgetting, F8, {"after": 5}, "after=5 with 4 domains.*1 to 4"),
    (metrics.plasticity, F8, {"single": [1, 2, 3]}, r"single has shape \(3,\).*give \(4,\)"),
    (metrics.fwt_vs_single, F8, {**ALONE, "first": 0}, "first=0.*give 1 or 2"),
    (metrics.forgetting_max_with_base, F8, {"upper": "zero"}, "upper='zero'.*'nan' or 'ignore'"),
    (metrics.remembering, F8, {}, "scores in .0, 1.*by 100"),
    (metrics.remembering, [[0], [-0.1]], {}, "scores in .0, 1.*by 100"),
]


@pytest.mark.parametrize(("metric", "R", "options", "message"), WRONG)
def test_wrong_input_is_refused_with_the_remedy(
    metric: Callable[..., Any], R: Any, options: Options, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metric(R, higher_is_better=True, **options)


def test_documented_examples() -> None:
    modules = [variants, *(sys.modules[m.function.__module__] for m in matrix_metrics().values()), base]
    results = [doctest.testmod(module) for module in modules]
    assert sum(result.attempted for result in results) > 4
    assert not any(result.failed for result in results)


NEW_METRIC = '''
"""Range of the last row."""

from residency.metrics.definitions.base import About, Scores, utility

ABOUT = About(kind="loss", title="spread", help="best minus worst domain at the end", rank=900)


def spread(R: Scores, *, higher_is_better: bool) -> float:
    u = utility(R, higher_is_better=higher_is_better)
    return float(u[-1].max() - u[-1].min())
'''


@pytest.fixture
def new_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One more file in the folder of definitions, and no other edit."""
    (tmp_path / "spread.py").write_text(NEW_METRIC)
    monkeypatch.setattr(definitions, "__path__", [*definitions.__path__, str(tmp_path)])
    matrix_metrics.cache_clear()
    yield
    matrix_metrics.cache_clear()
    sys.modules.pop("residency.metrics.definitions.spread", None)


@pytest.mark.usefixtures("new_metric")
def test_a_new_metric_is_one_file() -> None:
    """Summary, search and the printed direction know it."""
    from residency.study.planning.search_space import directions

    assert metrics.summary(F8, higher_is_better=True)["spread"] == 35.0
    assert directions()["spread"] == "minimize"
    assert printed_sign("spread", higher_is_better=False) == 1.0


def test_losses_read_as_losses() -> None:
    assert printed_sign("average", higher_is_better=False) == -1.0
    assert printed_sign("bwt", higher_is_better=False) == printed_sign("average", higher_is_better=True) == 1.0
