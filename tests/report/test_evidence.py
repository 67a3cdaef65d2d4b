"""Intervals and differences: estimates equal the metrics, pairs are pairs, Pareto fronts are fronts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from residency.report.charts.overview import pareto
from residency.report.records.arms import Arm, arms_of
from residency.report.records.contrasts import METRICS, contrasts, example_interval
from residency.report.records.records import read_material
from support.synthetic_studies import write_study


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Arm]:
    """The quickstart with three seeds."""
    folder = write_study(tmp_path_factory.mktemp("s") / "s", seeds=(0, 1, 2), rows=16)
    return {arm.value: arm for arm in arms_of(read_material([folder]))}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scorer", ["nll", "accuracy"])
def test_resampled_examples_are_centred_on_the_metric(arms: dict[str, Arm], metric: str, scorer: str) -> None:
    for arm in arms.values():
        own = Arm(place=arm.place, subject=arm.subject, scorer=scorer, entries=arm.entries)
        found = example_interval(own, metric)
        assert found is not None
        wanted = sum(own.utility(metric).values()) / 3
        assert found.estimate == pytest.approx(wanted, abs=1e-9)
        assert found.low <= found.estimate <= found.high


def test_differences_are_paired_and_positive_is_better(arms: dict[str, Arm]) -> None:
    found = {(c.value, c.metric): c for c in contrasts(list(arms.values()), "none")}
    assert {value for value, _ in found} == {"replay", "ewc", "mixing"}
    for (value, metric), contrast in found.items():
        own, base = arms[value].mean(metric), arms["none"].mean(metric)
        assert own is not None
        assert base is not None
        assert contrast.seeds.difference == pytest.approx(base - own), "less of a loss and less forgetting are better"
        assert contrast.examples is not None
        assert contrast.examples.estimate == pytest.approx(contrast.seeds.difference)
    # Rows that are hard for everybody cancel: a paired interval is shorter than those of its parts.
    own = example_interval(arms["replay"], "average")
    paired = found["replay", "learning"].examples
    assert own is not None
    assert paired is not None
    assert paired.half_width < own.half_width


def test_what_was_not_scored_alike_is_not_resampled(arms: dict[str, Arm], tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", rows=0)
    bare = arms_of(read_material([folder]))
    assert [c.examples for c in contrasts(bare, "none")] == [None] * 9
    assert example_interval(bare[0], "average") is None


def test_nobody_on_the_front_is_beaten_and_everybody_else_is() -> None:
    rng = random.Random(0)
    for higher in (True, False):
        rows = [{"method": str(i), "learning": rng.random(), "forgetting": rng.random()} for i in range(60)]
        sign = 1 if higher else -1
        front = {row["method"] for row in pareto(rows, higher=higher)}
        for row in rows:
            beaten = any(
                sign * other["learning"] >= sign * row["learning"] and other["forgetting"] < row["forgetting"]
                for other in rows
            )
            assert (row["method"] in front) != beaten
