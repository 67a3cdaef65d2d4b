"""The table of methods in a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from residency.report.page.build import Report
from residency.report.records.records import read_records
from residency.report.tables.console import methods_table
from support.synthetic_studies import write_study


@pytest.mark.parametrize("seeds", [1, 3])
def test_names_words_and_headings_fit_80_columns(seeds: int, tmp_path: Path) -> None:
    report = Report.of(read_records([write_study(tmp_path / "quick", seeds=range(seeds))]))
    rows = dict(report.frames.items())["methods"].to_dicts()
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    console.print(methods_table(rows, scorer="nll", unit="nats", higher=False))
    console.file.close()
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for word in ("none", "replay", "ewc", "mixing", "baseline", "forgetting", "evidence", "seconds", "state"):
        assert word in text, f"{word} is cut off"
    assert "…" not in text
