"""Numbers from elsewhere: fixtures of the specification and the published O-LoRA matrices.

The published matrices are in a data folder beside the repository; without it their tests are skipped.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residency import metrics

Metric = Callable[..., float]
nan = math.nan
DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "matrices"
needs_data = pytest.mark.skipif(
    not (DATA / "golden_metrics.json").is_file(), reason="no published matrices: ../shared/data/matrices is absent"
)

# O-LoRA issue 41, order 1, exact match in percent; scores of later domains were not printed.
F1 = [[nan] * 4, [98.59, nan, nan, nan], [87.84, 60.26, nan, nan], [74.84, 46.67, 73.46, nan]]
F1.append([70.61, 41.41, 64.97, 90.78])
# O-LoRA issue 23, order 2 of LLaMA-2 (dbpedia, amazon, yahoo, agnews); two cells of the last row are taken as unknown.
F2 = [[nan] * 4, [97.6184, nan, nan, nan], [33.4474, 52.9868, nan, nan], [10.2105, 3.3289, 66.8947, nan]]
F2.append([nan, 25.5132, nan, 87.4868])
F3 = [[nan, nan, nan], [2.0, nan, nan], [2.5, 1.5, nan], [2.2, 1.8, 1.0]]

GOLDEN: dict[str, Metric] = {
    "average_accuracy_final": metrics.average,
    "learning_accuracy": metrics.learning,
    "bwt_gem": metrics.bwt,
    "bwt_divided_by_T": metrics.bwt_over_T,
    "bwt_triangle": metrics.bwt_triangle_skip_neighbour,
    "fwt_minus_constant": metrics.fwt_diag_minus_constant,
    "forgetting_first_minus_last": metrics.forgetting_first_last,
    "forgetting_max_before_last": metrics.forgetting,
    "forgetting_max_with_last": partial(metrics.forgetting_max_including_last, upper="ignore"),
    "forgetting_skip_previous": metrics.forgetting_skip_neighbour,
    "retention_ratio": metrics.stability,
}

# Section 7 of the specification.
COLUMNS: list[Metric] = [
    metrics.average,
    metrics.learning,
    metrics.bwt,
    metrics.bwt_over_T,
    metrics.bwt_triangle,
    metrics.bwt_triangle_skip_neighbour,
    metrics.forgetting,
    partial(metrics.forgetting_max_including_last, upper="ignore"),
    metrics.forgetting_skip_neighbour,
    metrics.stability,
]
RUNS = {
    "order1_seqft": "67.7665 78.6414 -14.5000 -10.8750 -12.5767 -7.0526 14.5000 14.5000 6.6886 0.8163",
    "order1_icrlora": "68.6184 79.5296 -14.5483 -10.9112 -14.9803 -8.8903 14.5483 14.5483 11.8026 0.8025",
    "order1_olora": "78.3651 79.2500 -1.1798 -0.8849 -0.8925 -0.6623 1.1798 1.1798 0.8904 0.9829",
    "long_seqlora": "32.0406 76.8071 -47.9640 -44.7664 -24.6042 -23.4485 48.9510 48.9510 47.2257 0.3754",
    "long_icrlora": "58.4372 76.5810 -19.4398 -18.1438 -17.9659 -17.0283 20.3759 20.3759 18.9178 0.7587",
    "long_olora": "72.1746 72.8586 -0.7329 -0.6840 -2.5268 -2.3758 1.7436 2.0490 0.7526 0.9956",
}


@cache
def golden() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DATA / "golden_metrics.json").read_text(encoding="utf-8"))
    return content


def with_base(rows: list[list[float | None]]) -> list[list[float | None]]:
    return [[None] * len(rows), *rows]


def read_csv(run: str) -> tuple[list[str], list[list[float | None]]]:
    with (DATA / f"olora_{run}.csv").open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    return header[1:], [[float(cell) if cell else None for cell in line[1:]] for line in lines]


@needs_data
@pytest.mark.parametrize("run", RUNS)
def test_every_golden_value(run: str) -> None:
    entry = golden()["matrices"][f"olora_{run}"]
    R = with_base(entry["accuracy_matrix"])
    assert {name: metric(R, higher_is_better=True) for name, metric in GOLDEN.items()} == pytest.approx(
        entry["values"], abs=1e-6
    )
    previous = metrics.forgetting_max_all_previous(R, higher_is_better=True, upper="ignore")
    assert previous == metrics.forgetting(R, higher_is_better=True)


@needs_data
@pytest.mark.parametrize("run", RUNS)
def test_section_7(run: str) -> None:
    R = with_base(golden()["matrices"][f"olora_{run}"]["accuracy_matrix"])
    values = [metric(R, higher_is_better=True) for metric in COLUMNS]
    assert values == pytest.approx([float(value) for value in RUNS[run].split()], abs=1e-4)


@needs_data
def test_nothing_golden_is_left_out() -> None:
    assert set(golden()["matrices"]) == {f"olora_{run}" for run in RUNS}
    assert set(golden()["definitions"]) == set(GOLDEN)
    for name, entry in golden()["matrices"].items():
        assert read_csv(name.removeprefix("olora_")) == (entry["tasks"], entry["accuracy_matrix"])


@needs_data
def test_a_row_missing_in_the_logs() -> None:
    domains, rows = read_csv("order1_seqlora")
    R = with_base(rows)
    missing = metrics.missing_cells(R, domains, trained_only=True)
    assert missing == [("yahoo", "dbpedia"), ("yahoo", "amazon"), ("yahoo", "yahoo")]
    for metric in (metrics.learning, metrics.anytime_average, metrics.bwt, metrics.forgetting, metrics.fwt):
        assert math.isnan(metric(R, higher_is_better=True))
    assert metrics.average(R, higher_is_better=True) == pytest.approx((59.0526 + 39.7105 + 62.5395 + 90.1974) / 4)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        *((partial(metrics.average, after=k), v) for k, v in [(1, 98.59), (2, 74.05), (3, 64.99), (4, 66.9425)]),
        (metrics.anytime_average, 76.143125),
        (metrics.learning, 80.7725),
        (metrics.bwt, -18.44),
        (metrics.forgetting, 18.44),
        (metrics.bwt_over_T, -13.83),
        (metrics.min_accuracy, (70.61 + 41.41 + 64.97) / 3),
        (metrics.relative_forgetting, 23.739528),
        (lambda R, **o: metrics.learning(R, **o) + 0.75 * metrics.bwt(R, **o), 66.9425),
    ],
)
def test_lower_triangle(metric: Metric, expected: float) -> None:
    """F1: everything but forward transfer can be had from a lower triangle."""
    assert metric(F1, higher_is_better=True) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(metrics.fwt(F1, higher_is_better=True))


def test_incomplete_report() -> None:
    """F2: a missing cell is neither 0 nor left out of a mean."""
    assert metrics.missing_cells(F2, trained_only=True) == [(4, 0), (4, 2)]
    for metric in (metrics.average, metrics.bwt, metrics.forgetting, metrics.anytime_average, metrics.stability):
        assert math.isnan(metric(F2, higher_is_better=True))
    assert metrics.average(F2, higher_is_better=True, after=3) == pytest.approx(26.8114, abs=5e-5)
    assert metrics.learning(F2, higher_is_better=True) == pytest.approx(76.246675)


def test_remembering() -> None:
    """REM of F8 / 100; a gain counts as nothing lost."""
    F8 = np.array([[20, 30, 76, 40], [80, 35, 30, 42], [70, 75, 74, 41], [85, 60, 70, 45], [75, 78, 55, 90]])
    assert metrics.remembering(F8 / 100, higher_is_better=True) == pytest.approx(0.938333, abs=5e-7)
    assert metrics.remembering(np.array([[-9, 9], [0.0, 9], [0.7, 1.0]]), higher_is_better=True) == 1.0
    assert metrics.remembering([[nan, nan], [0.5, nan], [0.7, 0.9]], higher_is_better=False) == pytest.approx(0.8)
    assert math.isnan(metrics.remembering([[nan, nan], [nan, nan], [0.7, 0.9]], higher_is_better=True))


def test_losses() -> None:
    """F3: nats, lower is better."""
    assert metrics.bwt(F3, higher_is_better=False) == pytest.approx(-0.25)
    assert metrics.forgetting(F3, higher_is_better=False) == pytest.approx(0.25)
    assert metrics.relative_forgetting(F3, higher_is_better=False) == pytest.approx(15.0)
    assert metrics.average(F3, higher_is_better=False) == pytest.approx(-5 / 3)
    assert metrics.perplexity_forgetting(F3) == pytest.approx([1.2214, 1.3499], abs=5e-5)
    assert metrics.perplexity_forgetting([[0.0], [1.0]]).shape == (0,)
    kept = (math.exp(-0.2) + math.exp(-0.3)) / 2
    assert metrics.stability(F3, higher_is_better=False) == pytest.approx(kept)
    gained = (math.exp(0.1) + 2) / 3
    assert metrics.plasticity(F3, higher_is_better=False, single=[2.1, 1.5, 1.0]) == pytest.approx(gained)
    bad = [[nan, nan], [0.0, nan], [5000.0, 0.0]]
    assert metrics.perplexity_forgetting(bad) == [math.inf]
    assert metrics.stability(bad, higher_is_better=False) == 0.0
    assert metrics.stability_plasticity(bad, higher_is_better=False, single=[0.0, 0.0]) == 0.0
    lost = [[nan, nan], [5000.0, nan], [10000.0, 5000.0]]
    assert math.isnan(metrics.stability_plasticity(lost, higher_is_better=False, single=[0.0, 0.0]))
