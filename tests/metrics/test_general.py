"""Fixture F4 (TRACE's general-ability deltas), curves over training time, and warnings beside BWT."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest

from residency.metrics import anytime, general, learning_check
from residency.metrics.anytime import learning_curve_area, stability_gap
from residency.metrics.general import ability_deltas
from residency.metrics.learning_check import learning_gain, plasticity_warnings

nan = math.nan
NAMES = ["MMLU", "GSM", "BBH", "TydiQA", "BoolQ", "PIQA"]
TRACE = {
    "7B base": "46.56 26.08 40.23 23.47 70.55 76.22",
    "7B SeqFT": "46.43 3.49 30.11 33.23 77.89 76.50",
    "7B LoRASeqFT": "42.28 14.71 33.61 21.72 53.43 75.19",
    "7B Replay": "47.04 3.03 36.61 31.57 75.75 75.30",
    "13B base": "54.61 43.14 49.70 27.65 81.50 78.24",
    "13B SeqFT": "41.88 2.12 19.47 32.27 82.08 77.15",
}


def row(name: str) -> dict[str, float | None]:
    return dict(zip(NAMES, map(float, TRACE[name].split()), strict=True))


@pytest.mark.parametrize("module", [general, anytime, learning_check])
def test_documented_examples(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("run", "exact", "minimum", "worst"),
    [
        ("7B SeqFT", -2.576667, -22.59, "GSM"),
        ("7B LoRASeqFT", -7.028333, -17.12, "BoolQ"),
        ("7B Replay", -2.301667, -23.05, "GSM"),
        ("13B SeqFT", -13.311667, -41.02, "GSM"),
    ],
)
def test_trace(run: str, exact: float, minimum: float, worst: str) -> None:
    """F4: the mean hides a collapse that the minimum shows."""
    found = ability_deltas(row(f"{run.split()[0]} base"), row(run), higher_is_better=True)
    assert found.mean == pytest.approx(exact, abs=5e-7)
    assert (found.minimum, found.worst) == (pytest.approx(minimum), worst)
    assert list(found.deltas) == NAMES
    assert found.missing == []


def test_the_mean_of_trace_hides_two_movements() -> None:
    deltas = ability_deltas(row("7B base"), row("7B SeqFT"), higher_is_better=True).deltas
    assert deltas["GSM"] == pytest.approx(-22.59)
    assert deltas["TydiQA"] == pytest.approx(9.76)


def test_losses_are_turned() -> None:
    found = ability_deltas({"wiki": 2.0, "chat": 3.0}, {"wiki": 2.5, "chat": 2.9}, higher_is_better=False)
    assert found.deltas == {"wiki": pytest.approx(-0.5), "chat": pytest.approx(0.1)}
    assert (found.worst, found.mean) == ("wiki", pytest.approx(-0.2))


@pytest.mark.parametrize("gap", [None, nan, math.inf])
def test_a_missing_benchmark_is_listed_and_never_averaged_over(gap: float | None) -> None:
    for base, after in (({"a": 1.0, "b": gap}, {"a": 2.0, "b": 1.0}), ({"a": 1.0}, {"a": 2.0, "b": 1.0})):
        found = ability_deltas(base, after, higher_is_better=True)
        assert found.missing == ["b"]
        assert found.deltas["a"] == 1.0
        assert math.isnan(found.mean)
        assert math.isnan(found.minimum)
        assert found.worst is None
    nothing = ability_deltas({}, {}, higher_is_better=True)
    assert math.isnan(nothing.mean)
    assert nothing.worst is None


def test_area_under_the_learning_curve() -> None:
    assert learning_curve_area([0, 50, 400], [0.3, 0.3, 0.3]) == pytest.approx(0.3)
    # The same curve counted in tokens instead of samples.
    y = [0.1, 0.5, 0.6]
    assert learning_curve_area([0, 10, 40], y) == pytest.approx(learning_curve_area([0, 120, 480], y))
    assert learning_curve_area([0, 10, 40], y) == pytest.approx((3 + 16.5) / 40)
    assert math.isnan(learning_curve_area([5], [0.1]))
    assert math.isnan(learning_curve_area([0, 1, 2], [0.1, nan, 0.2]))
    for samples in ([0, 0, 1], [2, 1, 3], [0, 1]):
        with pytest.raises(ValueError, match="rise strictly"):
            learning_curve_area(samples, y)


def test_stability_gap() -> None:
    assert stability_gap([0.8, 0.9, 0.95], higher_is_better=True) == 0.0
    assert stability_gap([2.0, 2.6, 1.9], higher_is_better=False) == pytest.approx(-0.6)
    assert math.isnan(stability_gap([0.8, nan], higher_is_better=True))
    with pytest.raises(ValueError, match="one domain"):
        stability_gap([], higher_is_better=True)


# -- plasticity beside BWT -------------------------------------------------------------------------------------------

LEARNT = [[0.1, 0.1], [0.8, 0.1], [0.7, 0.8]]


def test_no_warning_where_much_was_learnt() -> None:
    assert plasticity_warnings(LEARNT, ["law", "code"], higher_is_better=True, single=[0.8, 0.8]) == []


def test_what_did_not_learn_cannot_forget() -> None:
    R = [[0.5, 0.5], [0.5, 0.5], [0.5, 0.9]]
    (warning,) = plasticity_warnings(R, ["law", "code"], higher_is_better=True)
    assert warning.startswith("training on law did not improve it")
    losses = [[2.0, 2.0], [2.1, 2.0], [2.1, 1.0]]
    assert learning_gain(losses, higher_is_better=False) == pytest.approx([-0.1, 1.0])
    assert "law" in plasticity_warnings(losses, ["law", "code"], higher_is_better=False)[0]


def test_praised_bwt_of_under_training() -> None:
    """The pattern of PEFT's OSF example: the first domain is learnt while later ones are trained."""
    R = [[0.1, 0.1], [0.2, 0.1], [0.5, 0.3]]
    (warning,) = plasticity_warnings(R, ["law", "code"], higher_is_better=True)
    assert "BWT +0.3" in warning
    assert "under-trained" in warning


def test_plasticity_that_was_paid_for_stability() -> None:
    (warning,) = plasticity_warnings(LEARNT, ["law", "code"], higher_is_better=True, single=[1.0, 1.0])
    assert warning == "learnt only 80 % of what training on each domain alone reaches"


def test_missing_cells_give_no_warning_of_their_own() -> None:
    R = [[nan, nan], [0.8, nan], [0.9, 0.8]]
    assert plasticity_warnings(R, ["law", "code"], higher_is_better=True) == []
    with pytest.raises(ValueError, match="3 names for 2 domains"):
        plasticity_warnings(R, ["a", "b", "c"], higher_is_better=True)
