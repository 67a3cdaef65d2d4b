"""What is said about two methods, and when nothing may be said."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest

from residency.metrics import comparison
from residency.metrics.comparison import compare, compare_family, seeds_needed

A = np.array([0.80, 0.90, 0.70, 0.85, 0.75, 0.82])
B = A - [0.30, 0.30, 0.20, 0.25, 0.35, 0.28]
NAMES = ("EWC", "plain")


def test_documented_examples() -> None:
    assert doctest.testmod(comparison).failed == 0


def test_three_seeds_cannot_be_significant() -> None:
    found = compare(A[:3], B[:3], higher_is_better=True, names=NAMES)
    assert found.outcome == "insufficient"
    assert "n = 3 seeds cannot reach p < .05" in found.verdict
    assert "smallest possible p is .25" in found.verdict


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_fewer_than_six_never_are(n: int) -> None:
    for first, second in ((A, B), (B, A)):
        assert compare(first[:n], second[:n], higher_is_better=True).outcome == "insufficient"


def test_six_are_if_all_agree() -> None:
    better = compare(A, B, higher_is_better=True, names=NAMES)
    worse = compare(A, B, higher_is_better=False, names=NAMES)
    assert (better.outcome, better.p, better.improvement > 0.5) == ("better", 0.03125, True)
    assert (worse.outcome, worse.p, worse.improvement < 0.5) == ("worse", 0.03125, True)
    assert better.difference == -worse.difference == pytest.approx(0.28)
    assert better.verdict.startswith("EWC is better than plain by 0.28 (95 % interval 0.")
    assert worse.verdict.startswith("EWC is worse than plain by 0.28 (95 % interval 0.")
    disagreeing = compare(A, np.append(B[:5], 1.0), higher_is_better=True, names=NAMES)
    assert disagreeing.outcome == "undecided"
    assert "do not tell from chance" in disagreeing.verdict


def test_identical_methods() -> None:
    found = compare(A, A, higher_is_better=True, names=NAMES)
    assert (found.outcome, found.p, found.difference, found.improvement) == ("equal", 1.0, 0.0, 0.5)
    assert found.verdict == "EWC and plain are equal: the difference is 0 for every seed (n = 6 seeds)."


def test_one_seed() -> None:
    found = compare(A[:1], B[:1], higher_is_better=True, names=NAMES)
    assert found.outcome == "insufficient"
    assert "n = 1 seed cannot" in found.verdict
    assert "nan" not in found.verdict


def test_level_on_average() -> None:
    found = compare([1.0, 0.0] * 4, [0.0, 1.0] * 4, higher_is_better=True, names=NAMES)
    assert found.verdict.startswith("EWC and plain are level on average (95 % interval -")


def test_missing_values() -> None:
    found = compare([0.5, math.nan], [0.4, 0.3], higher_is_better=True, names=NAMES)
    assert found.outcome == "missing"
    assert "a value is missing" in found.verdict
    with pytest.raises(ValueError, match="paired"):
        compare(A, B[:5], higher_is_better=True)


def test_noise_floor_is_said() -> None:
    loud = compare(A, B, higher_is_better=True, noise_floor=0.5)
    assert "below the noise floor of the evaluation sets (±0.5)" in loud.verdict
    assert "noise floor" not in compare(A, B, higher_is_better=True, noise_floor=0.1).verdict
    assert "noise floor" not in compare(A, B, higher_is_better=True).verdict


def test_a_family_corrects_for_its_size() -> None:
    others = {"plain": B, "one": A, "two": A + 0.1}
    two = compare_family(others, baseline="plain", higher_is_better=True)  # type: ignore[arg-type]
    assert [c.p for c in two] == [0.03125] * 2
    assert [c.p_adjusted for c in two] == [0.0625] * 2
    assert [c.outcome for c in two] == ["insufficient"] * 2
    assert "cannot reach p < .05 in a family of this size" in two[0].verdict
    longer = {name: np.concatenate([v, v - 0.01]) for name, v in others.items()}
    found = compare_family(longer, baseline="plain", higher_is_better=True)  # type: ignore[arg-type]
    assert [c.outcome for c in found] == ["better"] * 2
    assert "after correction for several comparisons" in found[0].verdict
    with pytest.raises(ValueError, match="baseline"):
        compare_family(longer, baseline="missing", higher_is_better=True)  # type: ignore[arg-type]


def test_undecided_in_a_family_means_that_it_could_have_been_shown() -> None:
    noise = np.array([1, -1, 1, -1, 1, -1, 1, -1, 1, -1.0])
    values = {"plain": np.zeros(10), "clear": np.arange(1.0, 11), "noise": noise + 0.1}
    clear, unclear = compare_family(values, baseline="plain", higher_is_better=True)  # type: ignore[arg-type]
    assert (clear.outcome, unclear.outcome) == ("better", "undecided")


@pytest.mark.parametrize(("family", "seeds"), [(1, 6), (2, 7), (4, 8), (10, 9)])
def test_seeds_needed(family: int, seeds: int) -> None:
    assert seeds_needed(family=family) == seeds
    assert family * 2.0 ** (1 - seeds) < 0.05 <= family * 2.0 ** (2 - seeds)
