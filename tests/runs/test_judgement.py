"""What stands beside the scores: gaps, warnings, general ability."""

from __future__ import annotations

from typing import Any

import pytest

from residency.inspection.inspection import inside_record
from residency.runs.judgement import general_ability, missing, warnings


def entry(R: list[list[float | None]], *, up: bool = True) -> dict[str, Any]:
    return {"higher_is_better": up, "unit": "", "R": R}


def test_missing_cells_are_listed_where_a_score_was_asked_for() -> None:
    scores = {"accuracy": entry([[0.1, None], [None, None]]), "nll": entry([[1.0, 2.0], [0.5, 1.9]], up=False)}
    scorers = {"law": ["nll", "accuracy"], "chat": ["nll"]}
    assert missing(scores, scorers, ["law"]) == {"accuracy": [["law", "law"]]}
    assert missing(scores, {"law": ["nll", "accuracy"], "chat": ["nll", "accuracy"]}, ["law"]) == {
        "accuracy": [["before training", "chat"], ["law", "law"], ["law", "chat"]]
    }


def test_warnings_only_where_there_are_some() -> None:
    learnt = entry([[0.1, 0.1, 9.0], [0.8, 0.1, 9.0], [0.7, 0.8, 9.0]])
    idle = entry([[2.0, 2.0, 9.0], [2.1, 2.0, 9.0], [2.1, 1.0, 9.0]], up=False)
    found = warnings({"accuracy": learnt, "nll": idle}, ["law", "code"])
    assert list(found) == ["nll"]
    assert "training on law did not improve it" in found["nll"][0]


def test_general_ability_of_probes_and_benchmarks() -> None:
    nll = entry([[1.0, 3.0, 2.0], [0.5, 3.6, 1.9]], up=False)
    benchmarks = [
        {"metric": "acc", "higher_is_better": True, "value": 0.5},
        {"metric": "acc", "higher_is_better": True, "value": 0.2},
    ]
    inside = [{"lm_eval": {"benchmarks": {"sums": benchmark}}} for benchmark in benchmarks]
    found = general_ability({"nll": nll}, domains=1, probes=["chat", "wiki"], inside=inside)
    assert found["nll"]["deltas"] == {"chat": pytest.approx(-0.6), "wiki": pytest.approx(0.1)}
    assert (found["nll"]["mean"], found["nll"]["minimum"], found["nll"]["worst"]) == (
        pytest.approx(-0.25),
        pytest.approx(-0.6),
        "chat",
    )
    assert found["lm_eval/acc"]["deltas"] == {"sums": pytest.approx(-0.3)}


def test_a_probe_without_a_score_is_null_and_listed() -> None:
    accuracy = entry([[0.5, None, 0.7], [0.5, None, None]])
    found = general_ability({"accuracy": accuracy}, domains=1, probes=["chat", "wiki"], inside=[])
    assert found == {
        "accuracy": {"deltas": {"wiki": None}, "mean": None, "minimum": None, "worst": None, "missing": ["wiki"]}
    }
    assert general_ability({"accuracy": accuracy}, domains=3, probes=[], inside=[]) == {}


def test_results_keep_what_is_small() -> None:
    stages = [{}, {"inside": {"weights": {"frobenius": 0.1, "layers": {"q": {}}}}}]
    assert inside_record(stages) == [{}, {"weights": {"frobenius": 0.1}}]
    assert inside_record([{}, {}]) == []
