"""The end of a study prints the report's decision, and an unchanged study prints the same again."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from residency.study.compare import compare
from residency.study.repeat import show_tables
from support.synthetic_studies import write_study


def test_the_end_of_a_study_prints_the_decision(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", seeds=range(3), rows=16)
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("cells/*/results.json"))]
    study: Any = SimpleNamespace(scorer="nll", baseline="none", axes={"mitigation": {}})
    out = StringIO()
    made = compare(study, folder, records, Console(file=out, width=160))
    assert made is not None
    assert Path(made["page"]).is_file()
    assert "Take replay. Evidence: shown over 3 seeds and 48 test rows" in out.getvalue().replace("\n", " ")
    assert "▲ better" in out.getvalue()
    again = StringIO()
    show_tables(records, scorer="nll", told=json.loads(json.dumps(made)), console=Console(file=again, width=160))
    assert again.getvalue() in out.getvalue()
