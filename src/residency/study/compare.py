"""The end of a study: the scores of its cells side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from residency.study.planning.cells import Cell
from residency.study.planning.study_file import Study
from residency.study.schedule import Failure

__all__ = ["compare", "failed_record"]


def failed_record(cell: Cell, failure: Failure) -> dict[str, Any]:
    """What stands for a cell that has no result, in tables."""
    status = f"failed (exit code {failure.code})"
    return {"cell": cell.id, "status": status, "axes": dict(cell.axes), "seed": cell.seed, "scores": {}, "summary": {}}


def compare(study: Study, folder: Path, records: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the tables, save the heat maps, write the report.

    Args:
        study: Its baseline and scorer.
        folder: Of the study.
        records: Of the cells of the axes; references are not compared with a baseline.
        console: Where to print.
    """
    from residency.report import build
    from residency.runs.views.heatmap import comparison, save
    from residency.runs.views.tables import comparison_table, score_table, verdict

    finished = [record for record in records if record["status"] == "done"]
    for record in finished:
        console.print(score_table(record, study.scorer))
    if not finished:
        return
    baseline = study.baseline or next(iter(next(iter(study.axes.values()), {"none": {}})))
    console.print(comparison_table(records, study.scorer, baseline=baseline))
    console.print(verdict(records, study.scorer, baseline=baseline))
    for picture in save(comparison(finished, study.scorer), folder / "report" / study.scorer):
        console.print(f"  heat maps: {escape(str(picture))}")
    console.print(f"  records: {escape(str(folder / 'cells'))}/<cell>/results.json")
    try:
        page = str(build(folder))
    except Exception as error:  # a picture that cannot be drawn must not look like a study that failed
        page = f"not built ({type(error).__name__}); the records are complete: residency report {folder} says why"
    console.print(f"  report: {escape(page)}")
