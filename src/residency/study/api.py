"""Studies from a notebook or a script: the verbs of many runs, and what they have left as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from residency.core.tensor_files import read_json
from residency.runs.folder import RunFolder
from residency.runs.loaded import Run, load_run
from residency.study.starter.command import init

__all__ = ["StudyRuns", "init", "load_study", "sweep"]


@dataclass(frozen=True, kw_only=True)
class StudyRuns:
    """What a study has so far.

    Args:
        path: Its folder.
        runs: The finished runs by cell.
        summary: One row per cell and scorer: cell, status (`done` or `missing`), seed, a column per axis, scorer,
            average, learning, bwt, forgetting, fwt, ...
    """

    path: Path
    runs: Mapping[str, Run]
    summary: pl.DataFrame

    def __repr__(self) -> str:
        lines = [f"{self.path}: {len(self.runs)} of {self.summary['cell'].n_unique()} cells are done"]
        return "\n".join([*lines, *(f"  {cell}" for cell in [*self.runs][:20]), *["  ..."] * (len(self.runs) > 20)])


def sweep(study: str | Path, *, study_dir: str | Path | None = None) -> StudyRuns:
    """Run what is missing of a study, as `residency sweep STUDY --study_dir STUDY_DIR` does.

    Args:
        study: Path of a study file, or the name of a preset.
        study_dir: Folder of the study; studies/<name> by default.

    Returns:
        All its runs; a cell that failed has no run, and `missing` in the summary.

    Raises:
        UserError: The study or a cell of it is wrong; nothing has run then.
    """
    from residency.study.command import sweep as run_study
    from residency.study.planning.study_file import load_study as read_study

    folder = Path("studies") / read_study(Path(study)).name if study_dir is None else Path(study_dir)
    run_study(Path(study), study_dir=folder)
    return load_study(folder)


def load_study(path: str | Path) -> StudyRuns:
    """Read what a study has so far.

    Args:
        path: Its folder.

    Raises:
        UserError: There is no study.
    """
    folder = Path(path)
    cells = read_json(folder / "plan.json")["cells"]
    done = {cell["id"] for cell in cells if RunFolder(folder / "cells" / cell["id"]).results() is not None}
    runs = {cell["id"]: load_run(folder / "cells" / cell["id"]) for cell in cells if cell["id"] in done}
    rows = [row for cell in cells for row in _summary(cell, runs.get(cell["id"]))]
    return StudyRuns(path=folder, runs=runs, summary=pl.DataFrame(rows, infer_schema_length=None))


def _summary(cell: Mapping[str, Any], run: Run | None) -> list[dict[str, Any]]:
    place = {"cell": cell["id"], "status": "missing", "seed": cell["seed"]}
    # An axis may have any name, also one of ours.
    place |= {axis if axis not in place else f"axis {axis}": value for axis, value in cell["axes"].items()}
    if run is None:
        return [place]
    found = run.record["summary"].items()
    return [{**place, "status": "done", "scorer": scorer, **metrics} for scorer, metrics in found]
