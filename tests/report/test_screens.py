"""Every screen prints the one decision: studies with known truth, rendered, and all words and colours compared."""

from __future__ import annotations

import json
import re
from html import unescape
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from residency.core.errors import UserError
from residency.report.evidence.of_records import findings_of
from residency.report.gate import Limit, judge
from residency.report.gate_command import gate_command
from residency.report.page.build import Report, write_report
from residency.report.records.records import read_records
from residency.report.tables.console import methods_table, spoken
from residency.study.api import load_run
from support.synthetic_studies import QUICKSTART, write_study

BASE = [[5.0, 5.0], [1.0, 5.0], [3.0, 1.0]]
STUDIES: dict[str, tuple[dict[str, Any], str]] = {
    "one is better": ({"none": BASE, "x": [[5.0, 5.0], [1.0, 5.0], [1.1, 1.0]]}, "Take x"),
    "one is worse": ({"none": BASE, "x": [[5.0, 5.0], [1.0, 5.0], [4.5, 1.0]]}, "Stay with no mitigation"),
    "nothing differs": ({"none": BASE, "x": BASE}, "Stay with no mitigation"),
}
SIDES = {"better": "shown to be better", "worse": "shown to be worse"}


@pytest.fixture(scope="module", params=STUDIES)
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, str]:
    matrices, headline = STUDIES[request.param]
    folder = write_study(tmp_path_factory.mktemp("t") / "s", matrices, domains=("a", "b"), seeds=range(5))
    return folder, Report.of(read_records([folder])), headline


def test_headline_facts_tables_and_forest_say_the_same(study: tuple[Path, Report, str]) -> None:
    _, report, headline = study
    found = findings_of(report.records, report.arms)
    words = {e.claim.metric: e.word for e in found.evidence if e.claim.scorer == "nll"}
    assert report.advice.headline.startswith(headline)
    assert (report.advice.choice == "x") == (words["average"] == "better")

    table = {r["metric"]: r["evidence"] for r in report.frames.comparisons.to_dicts() if r["scorer"] == "nll"}
    assert table == words
    row = next(r for r in report.frames.methods.to_dicts() if r["method"] == "x")
    assert row["evidence"] == words["average"]
    first = report.frames.first.to_dicts()
    if report.advice.leader == "x":
        assert first[0]["evidence"] == words["average"]
        colours = {True: "better", False: "worse"}
        metrics = ("average", "learning", "forgetting")
        for metric, fact in zip(metrics, report.advice.facts, strict=False):
            shown = words[metric] if words[metric] in SIDES else None
            assert colours.get(fact.good) == shown if fact.good is not None else shown is None

    forest = next(f for f in report.figures if f.id == "forest")
    data = next(iter(forest.spec["datasets"].values()))
    assert {d["metric"]: d["side"] for d in data} == {m: SIDES.get(w, "not shown") for m, w in words.items()}


def test_the_page_prints_these_words(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", STUDIES["one is better"][0], domains=("a", "b"), seeds=range(5))
    report = Report.of(read_records([folder]))
    html = unescape(write_report(report, tmp_path / "out").read_text())
    assert f"<h1>{report.advice.headline}</h1>" in html
    assert f'class="evidence {report.advice.strength}"' in html
    for row in report.frames.comparisons.to_dicts():
        assert row["in words"] in html
    hero = html[html.index('id="summary"') : html.index('id="methods"')]
    words = [row["evidence"] for row in report.frames.first.to_dicts()]
    for word in SIDES:
        assert hero.count(f'<tr class="shown-{word}">') == words.count(word)
    assert "better" in words


def test_the_console_prints_these_words(study: tuple[Path, Report, str]) -> None:
    _, report, headline = study
    console = Console(width=200, record=True, file=StringIO())
    console.print(methods_table(report.frames.methods.to_dicts(), scorer="nll", unit="nats", higher=False))
    console.print(spoken(report.advice))
    said = console.export_text()
    assert headline in said
    line = next(line for line in said.splitlines() if re.match(r"\s*x ", line))
    row = next(r for r in report.frames.methods.to_dicts() if r["method"] == "x")
    marks = {"better": "▲ better", "worse": "▼ worse", "open": "not shown", "equal": "equal"}
    assert marks[row["evidence"]] in line


def test_the_gate_measures_what_the_table_says(study: tuple[Path, Report, str]) -> None:
    """The paired difference and its interval are those of the comparison."""
    _, report, _ = study
    arms = {arm.value: arm.done for arm in report.arms}
    limit = Limit(kind="max", scorer="nll", metric="average", bound=0.0)
    judged = judge(limit, method="x", runs=arms["x"], scorer="nll", baseline=arms["none"], against="none")
    row = next(r for r in report.frames.comparisons.to_dicts() if (r["metric"], r["scorer"]) == ("average", "nll"))
    assert judged.value == pytest.approx(-row["better by"])
    assert judged.noise == pytest.approx((row["high"] - row["low"]) / 2)
    # Beyond the limit of no loss by more than the noise is what a test without correction calls worse.
    assert (judged.state == "crossed") == (row["high"] < 0)


def test_the_first_screen_names_the_domains_of_a_task_score(tmp_path: Path) -> None:
    wide = {name: [[*row, 3.0 + k / 10] for k, row in enumerate(R)] for name, R in QUICKSTART.items()}
    folder = write_study(tmp_path / "s", wide, seeds=range(3), probes=("general",))
    for path in folder.glob("cells/*/results.json"):
        text = path.read_text()
        record = json.loads(text)
        for line in record["scores"]["accuracy"]["R"]:
            line[1] = None
        path.write_text(json.dumps(record))
    report = Report.of(read_records([folder]))
    rows = {row["score"].split(",")[0]: row for row in report.frames.first.to_dicts()}
    assert rows["nll"]["domains"] == "medical, legal, code"
    assert rows["accuracy"]["domains"] == "medical, code"
    assert rows["accuracy"]["leader"] is not None
    html = write_report(report, tmp_path / "out").read_text()
    hero = html[html.index('id="summary"') : html.index('id="methods"')]
    assert "accuracy, higher is better" in hero
    assert "medical, code" in hero
    assert "general ability" in hero


def test_a_damaged_file_of_scores_is_said_on_every_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrices = {"none": BASE, "x": [[5.0, 5.0], [1.0, 5.0], [1.1, 1.0]]}
    folder = write_study(tmp_path / "s", matrices, domains=("a", "b"), seeds=range(3))
    file = next((folder / "cells").glob("x-*1/stages/2-*/scores.parquet"))
    file.write_bytes(file.read_bytes()[:-40] + b"\0" * 40)
    report = Report.of(read_records([folder]))
    (said,) = (text for text in report.advice.limits if text.startswith("Damaged"))
    assert "x-s1 (stage 2)" in said
    page = write_report(report, tmp_path / "report").read_text()
    assert "x-s1 (stage 2)" in unescape(page)
    assert "x-s1 (stage 2)" in spoken(report.advice)
    bases = {row["method"]: row["interval"] for row in report.frames.methods.to_dicts() if row["role"] == "train"}
    assert (bases["none"], bases["x"]) == ("seeds and rows", "seeds")
    assert gate_command([str(folder), "--max", "forgetting=9", "--json", str(tmp_path / "gate.json")]) == 0
    assert "x-s1 (stage 2)" in capsys.readouterr().out
    assert json.loads((tmp_path / "gate.json").read_text())["damaged"] == {"x-s1": [2]}
    with pytest.raises(UserError, match=r"scores\.parquet"):
        load_run(file.parents[2])


def test_answers_that_changed_sides_are_counted_on_the_page(tmp_path: Path) -> None:
    """Known truth: the synthetic answers are right by rank, so that a lower accuracy only loses."""
    matrices = {"none": BASE, "x": [[5.0, 5.0], [1.0, 5.0], [1.1, 1.0]]}
    folder = write_study(tmp_path / "s", matrices, domains=("a", "b"), seeds=range(3), spread=0.0)
    report = Report.of(read_records([folder]))
    rows = {(r["method"], r["from"]): r for r in report.frames.flips.to_dicts()}
    assert {*rows} == {("none", "itself, just learnt"), ("x", "itself, just learnt"), ("x", "none")}
    own = rows["none", "itself, just learnt"]
    accuracy = {e.record["axes"]["mitigation"]: e.record["scores"]["accuracy"]["R"] for e in report.records.done}
    lost = accuracy["none"][1][0] - accuracy["none"][2][0]
    assert own["right to wrong"] - own["wrong to right"] == pytest.approx(lost)
    assert (own["domains"], own["seeds"], own["interval"]) == ("a", 3, "seeds and rows")
    against = rows["x", "none"]
    gain = sum(accuracy["x"][2]) / 2 - sum(accuracy["none"][2]) / 2
    assert against["wrong to right"] - against["right to wrong"] == pytest.approx(gain)
    assert against["wrong to right, low"] <= against["wrong to right"] <= against["wrong to right, high"]
    page = write_report(report, tmp_path / "report").read_text()
    assert "Answers that changed sides" in page
    assert f"{own['right to wrong']:.1%}" in page
