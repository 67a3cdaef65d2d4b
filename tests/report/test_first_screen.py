"""The first screen: what every score is held against, benchmarks with their errors, calibration; known numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from residency.report.page.build import Report, write_report
from residency.report.records.records import read_records
from support.synthetic_studies import write_cell, write_study

BASE = [[5.0, 5.0], [1.0, 5.0], [3.0, 1.0]]
BETTER = [[5.0, 5.0], [1.0, 5.0], [1.1, 1.0]]
JOINT, PROMPTED = [[5.0] * 3, [0.5, 0.8, 1.0]], [[2.0, 2.5]] * 3


def _edit(path: Path, **more: Any) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **more}))


def _inside(*errors: float) -> list[dict[str, Any]]:
    """Findings of `AnswerCalibration` per row: the same error on both domains."""
    return [{"calibration": {"columns": {name: {"ece": e, "tokens": 9} for name in ("a", "b")}}} for e in errors]


def _general(a: float, b: float) -> dict[str, Any]:
    """What the record keeps of two benchmarks."""
    deltas = {"arc": a, "piqa": b}
    return {"lm_eval/acc": {"deltas": deltas, "mean": (a + b) / 2, "stderr": {"arc": 0.03, "piqa": 0.04}}}


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str]:
    """A study of two methods and three seeds, beside runs on all domains at once and with examples in the prompt."""
    tmp = tmp_path_factory.mktemp("first")
    matrices = {"none": BASE, "x": BETTER}
    folder = write_study(tmp / "s", matrices, domains=("a", "b"), seeds=range(3), spread=0.0)
    plan = json.loads((folder / "plan.json").read_text())
    for kind, matrix, own, probes in (("joint", JOINT, ("all",), ("a", "b")), ("prompted", PROMPTED, ("a", "b"), ())):
        axes = {"reference": kind}
        plan["cells"].append({"id": f"{kind}-s0", "axes": axes, "seed": 0, "reference": kind})
        write_cell(folder / "cells" / f"{kind}-s0", f"{kind}-s0", matrix, axes, 0, own, probes, spread=0.0)
    (folder / "plan.json").write_text(json.dumps(plan))
    data = {"domains": {name: {"test": {"majority": share}} for name, share in (("a", 0.2), ("b", 0.4))}}
    for seed in range(3):
        _edit(folder / f"cells/none-s{seed}/results.json", data=data, inside=_inside(0.1, 0.2, 0.4))
        _edit(folder / f"cells/none-s{seed}/results.json", general=_general(-0.1, -0.2))
        _edit(folder / f"cells/x-s{seed}/results.json", data=data, inside=_inside(0.1, 0.2, 0.3))
        _edit(folder / f"cells/x-s{seed}/results.json", general=_general(-0.01 * seed, 0.02))
    report = Report.of(read_records([folder]))
    return report, unescape(write_report(report, tmp / "out").read_text())


def _rows(report: Report) -> dict[str, Mapping[str, Any]]:
    return {row["score"].split(",")[0]: row for row in report.frames.first.to_dicts()}


def test_every_score_is_held_against_what_was_run(screen: tuple[Report, str]) -> None:
    rows = _rows(screen[0])
    nll, accuracy = rows["nll"], rows["accuracy"]
    assert nll["joint"] == pytest.approx((0.8 + 1.0) / 2)
    assert nll["prompted"] == pytest.approx((2.0 + 2.5) / 2)
    assert nll["majority"] is None, "a likelihood has no majority line"
    assert accuracy["majority"] == pytest.approx(0.3)
    joint = next(e.record for e in screen[0].records.done if e.reference == "joint")["scores"]["accuracy"]["R"]
    assert accuracy["joint"] == pytest.approx(sum(joint[-1][1:]) / 2)


def test_a_benchmark_has_its_error_its_mean_and_its_minimum(screen: tuple[Report, str]) -> None:
    report = screen[0]
    mean, worst = (row for row in report.frames.first.to_dicts() if row["score"].startswith("lm_eval"))
    assert (mean["leader"], mean["baseline"]) == (pytest.approx(0.005), pytest.approx(-0.15))
    assert mean["leader error"] == pytest.approx(math.hypot(0.03, 0.04) / 2)
    assert (worst["domains"], worst["leader"], worst["leader error"]) == ("arc", pytest.approx(-0.01), 0.03)
    table = {
        (r["method"], r["benchmark"]): (r["change"], r["standard error"]) for r in report.frames.benchmarks.to_dicts()
    }
    assert table["x", "piqa"] == (pytest.approx(0.02), 0.04)
    assert table["none", "arc"] == (pytest.approx(-0.1), 0.03)


def test_calibration_before_and_at_the_end(screen: tuple[Report, str]) -> None:
    row = _rows(screen[0])["calibration error (ECE)"]
    found = (row["before"], row["baseline"], row["leader"], row["domains"])
    assert found == (pytest.approx(0.1), pytest.approx(0.4), pytest.approx(0.3), "a, b")


def test_the_page_shows_them_before_the_table_of_methods(screen: tuple[Report, str]) -> None:
    html = screen[1]
    hero = html[html.index('id="summary"') : html.index('id="methods"')]
    for said in (">joint<", ">prompted<", ">majority<", "0.005 ± 0.025", "calibration error (ECE)", "0.300"):
        assert said in hero, said
    assert "Benchmarks since before training" in html


def test_a_study_without_them_has_no_empty_columns(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", {"none": BASE, "x": BETTER}, domains=("a", "b"), seeds=range(3))
    html = write_report(Report.of(read_records([folder])), tmp_path / "out").read_text()
    hero = html[html.index('id="summary"') : html.index('id="methods"')]
    assert not [said for said in (">joint<", ">prompted<", ">majority<", "calibration error") if said in hero]
