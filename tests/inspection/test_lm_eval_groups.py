"""A group of lm-eval counts once; a group without a score of its own leaves its tasks to count."""

from __future__ import annotations

from typing import Any

import pytest

from residency.inspection.lm_eval import _benchmarks
from residency.runs.judgement import general_ability


def found(law: float, code: float, alone: float) -> dict[str, Any]:
    """What the harness returns for the group `exams` of two tasks, the label `tag` of one, and that one."""

    def result(value: float) -> dict[str, Any]:
        return {"alias": "x", "acc,none": value, "acc_stderr,none": 0.03}

    return {
        "results": {
            "exams": result((law + code) / 2),
            "law": result(law),
            "code": result(code),
            "tag": {"alias": "tag", " ": " "},
            "alone": result(alone),
        },
        "group_subtasks": {"exams": ["law", "code"], "tag": ["alone"], "law": [], "code": [], "alone": []},
        "higher_is_better": {},
    }


def test_a_group_counts_once() -> None:
    inside = [{"lm": {"benchmarks": _benchmarks(found(*values))}} for values in ((0.6, 0.6, 0.5), (0.4, 0.2, 0.4))]
    ability = general_ability({}, domains=1, probes=[], inside=inside)["lm_eval/acc"]
    assert ability["deltas"] == pytest.approx({"exams": -0.3, "alone": -0.1})
    assert ability["mean"] == pytest.approx(-0.2)
    assert ability["worst"] == "exams"
    assert ability["stderr"] == pytest.approx({"exams": 0.03 * 2**0.5, "alone": 0.03 * 2**0.5})
