"""The page and its files: complete, self-contained, bounded, and deaf to what names contain."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from residency.core.errors import UserError
from residency.report import build
from residency.report.page.build import Report
from residency.report.records.records import read_records
from support.cli import call
from support.synthetic_studies import QUICKSTART, write_cell, write_study

SCRIPT, CLIMB = "<script>alert(1)</script>", "../../x"


class Page(HTMLParser):
    """What a browser would make of a page: elements, links, scripts, text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.text = ""
        self._inside: str | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            kind, before = self.scripts[-1]
            self.scripts[-1] = (kind, before + data)
        elif self._inside != "style":
            self.text += data

    def addresses(self) -> Iterator[str]:
        for _, attributes in self.tags:
            for name in ("src", "href"):
                if attributes.get(name):
                    yield str(attributes[name])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose domains, probe and cells have names from hell; one cell is missing."""
    folder = tmp_path_factory.mktemp("hostile") / "study"
    matrices = {SCRIPT: QUICKSTART["replay"], "none": QUICKSTART["none"], "</text>${1}": QUICKSTART["ewc"]}
    write_study(folder, matrices, domains=(SCRIPT, CLIMB, "=1+1"), rows=8, unfinished=("</text>${1}-s0",))
    plan = json.loads((folder / "plan.json").read_text())
    # Folders of cells are slugs, whatever their values are called.
    for number, cell in enumerate(plan["cells"]):
        place = folder / "cells" / cell["id"]
        cell["id"] = f"c{number}"
        if (place / "results.json").is_file():
            place.rename(folder / f"c{number}")
    shutil.rmtree(folder / "cells")
    (folder / "cells").mkdir()
    for made in folder.glob("c[0-9]"):
        made.rename(folder / "cells" / made.name)
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


@pytest.fixture(scope="module")
def page(hostile: Path) -> Path:
    """Its report, with published numbers beside."""
    return build(hostile, references=["olora-standard"])


@pytest.fixture(scope="module")
def read(page: Path) -> Page:
    """The report as a browser sees it."""
    return Page(page)


def test_nothing_of_a_name_becomes_markup_or_a_script(read: Page) -> None:
    assert len([kind for kind, _ in read.scripts if kind is None]) == 2
    for kind, text in read.scripts:
        if kind == "application/json":
            json.loads(text)  # whole: no name has ended the element
    assert SCRIPT in read.text
    assert CLIMB in read.text
    assert not [a for _, attributes in read.tags for a in attributes if a.startswith("on")]


def test_only_the_two_scripts_of_the_page_may_run(read: Page) -> None:
    policy = next(str(a["content"]) for t, a in read.tags if t == "meta" and a.get("http-equiv"))
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    own = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for k, text in read.scripts if k is None}
    assert allowed == own
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy


def test_the_page_asks_for_nothing(read: Page) -> None:
    assert not [address for address in read.addresses() if re.match(r"(?i)\s*(https?:)?//|javascript:", address)]


def test_files_stay_in_the_folder_and_every_link_leads_to_one(hostile: Path, page: Path, read: Page) -> None:
    links = [a for a in read.addresses() if not a.startswith(("#", "data:"))]
    assert len(links) > 40
    assert not [link for link in links if not (page.parent / link).is_file()]
    written = {path.relative_to(hostile).parts[0] for path in hostile.rglob("*")}
    assert written == {"plan.json", "study.yaml", "cells", "report"}
    assert [path.name for path in hostile.parent.iterdir()] == ["study"]
    assert not list(hostile.rglob("*.tmp"))
    assert page.stat().st_size < 5_000_000


def test_what_is_missing_is_listed(read: Page) -> None:
    assert "1 of 3 cells are not in these numbers" in read.text
    assert "c2" in read.text


def test_tables_as_csv_parquet_and_latex(page: Path) -> None:
    tables = page.parent / "tables"
    methods = pl.read_parquet(tables / "methods.parquet")
    assert methods.columns == pl.read_csv(tables / "methods.csv").columns
    row = methods.row(by_predicate=pl.col("method") == "none", named=True)
    assert row["forgetting"] == pytest.approx(row["average"] * 0 + 3.0588312697, rel=1e-6)
    latex = (tables / "domains.tex").read_text()
    assert latex.count(r"\toprule") == latex.count(r"\midrule") == latex.count(r"\bottomrule") == 1
    columns = latex.split(r"\begin{tabular}{")[1].split("}")[0]
    lines = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(columns) - 1}
    assert r"\textless{}script\textgreater{}" in latex
    # A spreadsheet takes no name for a formula.
    assert "'=1+1" in (tables / "domains.csv").read_text()
    assert "=1+1" in pl.read_parquet(tables / "domains.parquet")["domain"].to_list()


def test_figures_in_every_format(page: Path) -> None:
    folder = page.parent / "figures"
    for path in folder.glob("*.svg"):
        assert b"<script" not in path.read_bytes()
        assert path.with_suffix(".pdf").read_bytes()[:5] == b"%PDF-"
        assert path.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert json.loads(path.with_suffix(".vl.json").read_text())["$schema"]
    assert {path.stem for path in folder.glob("*.svg")} >= {"learned-and-kept", "plane", "forest", "matrices"}


def test_a_chart_without_data_is_a_sentence(read: Page) -> None:
    assert "Nobody looked inside the model in these runs" in read.text
    assert "No numeric setting was varied" in read.text
    assert "Only one axis was varied" in read.text


def test_a_run_alone_and_runs_side_by_side(tmp_path: Path) -> None:
    for name in ("none", "ewc"):
        write_cell(tmp_path / name, "run", QUICKSTART[name], {"mitigation": name}, 0, ("a", "b", "c"), rows=8)
        record = json.loads((tmp_path / name / "results.json").read_text()) | {"axes": {}}
        (tmp_path / name / "results.json").write_text(json.dumps(record))
    alone = Page(build(tmp_path / "none"))
    assert "There is no other method to compare with" in alone.text
    both = Page(build([tmp_path / "none", tmp_path / "ewc"], output=tmp_path / "both"))
    # What differs between the configs tells them apart.
    assert "No clear winner; ewc is ahead" in both.text
    assert (tmp_path / "both" / "index.html").is_file()


def test_published_numbers_stand_beside_with_source(read: Page, tmp_path: Path) -> None:
    for part in ("O-LoRA", "75.8 %", "read in the source itself", "never a pass mark", "Never compare with copied"):
        assert part in read.text
    study = write_study(tmp_path / "s", {"none": QUICKSTART["none"]}, rows=0)
    with pytest.raises(UserError, match="no published numbers"):
        build(study, references=["nope"])


def test_mistakes_are_told_and_nothing_is_written(tmp_path: Path) -> None:
    assert call("report").code == 2
    nothing = call("report", tmp_path)
    assert (nothing.code, "no run and no study" in nothing.err) == (2, True)
    study = write_study(tmp_path / "s", {"none": QUICKSTART["none"]}, rows=0)
    wrong = call("report", study, "--scorer", "blue")
    assert (wrong.code, "accuracy" in wrong.err) == (2, True)
    assert not (study / "report").exists()
    listed = call("report", "--reference", "list")
    assert (listed.code, "olora-standard" in listed.out) == (0, True)


def test_a_study_with_nothing_done_says_so(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", {"none": QUICKSTART["none"]}, unfinished=("none-s0",))
    text = Page(build(study)).text
    assert "Nothing to compare yet" in text
    assert "none-s0" in text


def test_no_torch_for_a_report() -> None:
    code = "import residency.report.page.build, sys; assert not {'torch', 'lightning', 'wandb'} & {*sys.modules}"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_two_reports_of_the_same_records_are_the_same(hostile: Path, page: Path, tmp_path: Path) -> None:
    again = build(hostile, output=tmp_path, references=["olora-standard"])
    assert again.read_bytes() == page.read_bytes()


def test_a_folder_whose_name_reads_as_a_pattern(tmp_path: Path) -> None:
    """Its own rows with their intervals, not those of a neighbour whose name fits."""
    plain = write_study(tmp_path / "plain" / "study", rows=8)
    turned = dict.fromkeys(QUICKSTART, QUICKSTART["none"])
    for neighbour in ("r1", "aXb"):
        write_study(tmp_path / neighbour / "study", turned, rows=8)
    expected = dict(Report.of(read_records([plain])).frames.items())
    assert not expected["comparisons"]["low"].null_count()
    for name in ("r*", "r[12]", "[", "a?b"):
        shutil.copytree(plain, tmp_path / name / "study")
        found = dict(Report.of(read_records([tmp_path / name / "study"])).frames.items())
        assert found.keys() == expected.keys()
        assert all(found[table].equals(frame) for table, frame in expected.items()), name
