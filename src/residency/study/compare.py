"""The end of a study: the scores of its cells side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from residency.core.text import for_terminal
from residency.core.yaml_files import read_yaml
from residency.study.planning.cells import Cell
from residency.study.planning.study_file import Study
from residency.study.repeat import show_files, show_tables
from residency.study.schedule import Failure

if TYPE_CHECKING:
    from residency.report.page.build import Report

__all__ = ["compare", "failed_record", "told_failure"]


def failed_record(cell: Cell, failure: Failure) -> dict[str, Any]:
    """What stands for a cell that has no result, in tables."""
    return {
        "cell": cell.id,
        "status": _status(failure),
        "axes": dict(cell.axes),
        "seed": cell.seed,
        "scores": {},
        "summary": {},
    }


def told_failure(failure: Failure) -> str:
    """Which task failed, whether its exit code says that the user can mend it, and what it told."""
    return f"{failure.title} {_status(failure)}: {failure.message}"


def _status(failure: Failure) -> str:
    return f"failed (exit code {failure.code})"


def compare(
    study: Study, folder: Path, records: Sequence[Mapping[str, Any]], console: Console
) -> dict[str, Any] | None:
    """Print the tables, save the heat maps, write the report.

    Args:
        study: Its baseline and scorer.
        folder: Of the study.
        records: Of the cells of the axes; references are not compared with a baseline.
        console: Where to print.

    Returns:
        {"scorer", "baseline", "methods", "said", "pictures", "page"}: what is shown again when nothing has changed;
        `None` if a view was not made.
    """
    from residency.report.page.build import Report, write_report
    from residency.report.records.records import read_records
    from residency.report.tables.console import spoken
    from residency.runs.views.heatmap import comparison, save

    finished = [record for record in records if record["status"] == "done"]
    baseline = study.baseline or next(iter(next(iter(study.axes.values()), {"none": {}})))
    if not finished:
        return None
    report = Report.of(read_records([folder], scorer=study.scorer, baseline=study.baseline))
    told = {"methods": report.frames.methods.to_dicts(), "said": spoken(report.advice)}
    show_tables(records, scorer=study.scorer, told=told, console=console)
    # A view that cannot be drawn or written must not look like a study that failed.
    try:
        pictures = [str(path) for path in save(comparison(finished, study.scorer), folder / "report" / study.scorer)]
        page = str(write_report(report, folder / "report"))
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        console.print(
            f"  report: not built ({type(error).__name__}: {escape(for_terminal(said))}); the records are", end=""
        )
        console.print(f" complete: residency report {escape(for_terminal(folder))} --output FOLDER makes it again")
        return None
    _track(report, folder, Path(page), Path(pictures[0]))
    made = {"scorer": study.scorer, "baseline": baseline, "pictures": pictures, "page": page, **told}
    show_files(folder, made, console)
    return made


def _track(report: Report, folder: Path, page: Path, heat_map: Path) -> None:
    """The report as a W&B run of its own, where the study's cells have theirs."""
    from residency.report.page.wandb_report import track_report
    from residency.runs.views.wandb_settings import WandbSettings

    files = sorted(folder.glob("cells/*/config.yaml"))
    config = read_yaml(files[0], what="the config of a cell") if files else {}
    given = config.get("wandb") or {}
    settings = WandbSettings(
        **{key: given[key] for key in ("project", "tags", "enabled") if given.get(key) is not None}
    )
    if settings.active:
        tables = report.frames.items()
        track_report(page, report.records, report.advice, tables, settings=settings, heat_map=heat_map)
