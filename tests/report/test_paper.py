r"""`report --paper`: a LaTeX table that compiles, whose numbers are those of the records, and whose bold is earned."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from statistics import fmean, stdev

import pytest

from residency.core.errors import UserError
from residency.report.page.build import Report, build
from residency.report.page.paper import paper_table
from residency.report.records.records import read_records
from support.synthetic_studies import write_study

BASE = [[5.0, 5.0], [1.0, 5.0], [3.0, 1.0]]
BETTER = [[5.0, 5.0], [1.0, 5.0], [1.1, 1.0]]
METRICS = ("average", "forgetting", "accuracy", "bwt")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five seeds; x is better, y is none under another name with characters that LaTeX would take for its own."""
    matrices = {"none": BASE, "x": BETTER, "y_&%": BASE}
    return write_study(tmp_path_factory.mktemp("p") / "s_1", matrices, domains=("a", "b"), seeds=range(5))


@pytest.fixture(scope="module")
def tex(study: Path) -> str:
    build(study, output=study / "out", paper=METRICS)
    return (study / "out" / "paper" / "table.tex").read_text()


def rows_of(tex: str) -> dict[str, list[str]]:
    body = tex.split(r"\midrule")[1].split(r"\bottomrule")[0]
    cells = [line.removesuffix(r"\\").split(" & ") for line in body.strip().splitlines()]
    return {name.strip(): [cell.strip() for cell in rest] for name, *rest in cells}


def records(study: Path, kind: str) -> list[dict[str, object]]:
    found = [json.loads(p.read_text()) for p in sorted(study.glob("cells/*/results.json"))]
    return [record for record in found if record["axes"]["mitigation"] == kind]


def test_numbers_are_mean_and_sd_of_the_summaries(study: Path, tex: str) -> None:
    names = {"none": "none", "x": "x", r"y\_\&\%": "y_&%"}
    rows = rows_of(tex)
    assert {*rows} == {*names}
    assert r"\caption{s\_1. Mean $\pm$ standard deviation over 5 seeds. " in tex
    for name, cells in rows.items():
        summaries = [record["summary"] for record in records(study, names[name])]
        wanted = [
            [-s["nll"]["average"] for s in summaries],  # a loss reads as a loss
            [s["nll"]["forgetting"] for s in summaries],
            [s["accuracy"]["average"] for s in summaries],
            [s["nll"]["bwt"] for s in summaries],
        ]
        for cell, values in zip(cells, wanted, strict=True):
            mean, sd = (float(n) for n in re.findall(r"-?\d+\.\d+", cell))
            assert mean == pytest.approx(fmean(values), abs=0.0051), cell
            assert sd == pytest.approx(stdev(values), abs=0.0051), cell


def test_bold_is_what_the_evidence_shows_and_nothing_else(study: Path, tex: str) -> None:
    rows = rows_of(tex)
    assert r"\mathbf" in rows["x"][0]
    assert r"\mathbf" in rows["x"][1]
    assert not any(r"\mathbf" in cell for name, cells in rows.items() for cell in cells if name != "x")
    same = write_study(study.parent / "same", {"none": BASE, "x": BASE}, domains=("a", "b"), seeds=range(5))
    build(same, output=same / "out", paper=METRICS)
    text = (same / "out" / "paper" / "table.tex").read_text()
    assert r"\mathbf" not in text
    assert "none is bold" in text


def test_one_seed_has_no_spread_and_no_bold(study: Path) -> None:
    one = write_study(study.parent / "one", {"none": BASE, "x": BETTER}, domains=("a", "b"), seeds=[0])
    build(one, output=one / "out", paper=["average"])
    text = (one / "out" / "paper" / "table.tex").read_text()
    assert r"\pm" not in text
    assert r"\mathbf" not in text
    assert "One run per row" in text


def test_the_table_is_whole(tex: str) -> None:
    """Environments are nested, braces and dollars are in pairs, every row has as many cells as the table columns."""
    stack = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", tex):
        if kind == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    bare = re.sub(r"\\[\\{}$&%#_]", "", "\n".join(line for line in tex.splitlines() if not line.startswith("%")))
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert not set("#~^<>|") & set(re.sub(r"\$.*?\$", "", bare))
    count = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", tex)[1])  # type: ignore[index]
    assert count == 1 + len(METRICS)
    assert all(len(cells) == count - 1 for cells in rows_of(tex).values())
    assert [tex.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX on this machine")
def test_it_compiles(study: Path, tex: str, tmp_path: Path) -> None:
    words = (study / "out" / "paper" / "definitions.tex").read_text()
    head = r"\documentclass{article}\usepackage{booktabs}\usepackage{makecell}\begin{document}"
    (tmp_path / "x.tex").write_text(f"{head}\n{tex}\n{words}\n\\end{{document}}", encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "x.tex"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_orders_are_pooled_with_seeds(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", {"none": BASE, "x": BETTER}, domains=("a", "b"), seeds=range(3))
    records = read_records([folder])
    for entry in records.entries:
        entry.record["axes"]["order"] = f"o{entry.record['seed']}"
    report = Report.of(records)
    table = paper_table(records, report.arms, report.findings, ["average"])
    assert {name: cells[0][2] for name, cells in table.rows.items() if cells[0]} == {"none": 3, "x": 3}


def test_a_metric_that_is_none_is_refused(study: Path) -> None:
    with pytest.raises(UserError, match="zorgetting"):
        build(study, output=study / "other", paper=["zorgetting"])
    assert not (study / "other").exists()
