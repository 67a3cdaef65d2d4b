"""The same verbs for a notebook or a script, and finished runs and studies as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from residency.core.errors import UserError
from residency.core.parquet_files import ParquetRefused, read_parquet
from residency.core.tensor_files import read_json
from residency.runs.folder import RunFolder

__all__ = ["Run", "StudyRuns", "export", "fit", "load_run", "load_study", "sweep"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Args:
        path: Its folder.
        record: What results.json holds: scores, summary, cost, provenance.
        history: One row per logged step: stage, domain, step, stream_step, loss, loss/task, ...
        scores: One row per scored example: stage (0 = before training), column (domain or probe), row, scorer, value,
            tokens.
    """

    path: Path
    record: Mapping[str, Any]
    history: pl.DataFrame
    scores: pl.DataFrame


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


def fit(config: Mapping[str, Any] | str | Path, *, run_dir: str | Path | None = None) -> dict[str, Any]:
    """Train a stream, or go on with it, as `residency fit --config CONFIG --run_dir RUN_DIR` does.

    Args:
        config: Keys and values as in a config file, or the path of one.
        run_dir: Folder of the run; runs/<name> by default.

    Returns:
        The record, as in results.json.

    Raises:
        UserError: What the user can mend.
    """
    from residency.runs.cli import ResidencyCLI

    text = json.dumps(config) if isinstance(config, Mapping) else str(config)
    words = ["fit", "--config", text, *([] if run_dir is None else ["--run_dir", str(run_dir)])]
    record: dict[str, Any] = read_json(ResidencyCLI(words).folder.path / "results.json")
    return record


def sweep(study: str | Path, *, study_dir: str | Path | None = None) -> StudyRuns:
    """Run what is missing of a study, as `residency sweep STUDY --study_dir STUDY_DIR` does.

    Args:
        study: Path of a study file.
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


def export(
    run: str | Path,
    *,
    stage: int | None = None,
    merge: bool = False,
    dtype: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a saved stage as a folder that other programs load, as `residency export RUN` does.

    Args:
        run: Folder of the run.
        stage: 1 ... T; the last one that is saved by default.
        merge: Fold the adapter into the backbone's own weights, and score the result again.
        dtype: Of merged weights, `float32` or `bfloat16`; the backbone's own by default.
        output: Folder to write; RUN/export/<stage>-<domain> by default.
        overwrite: Replace an earlier export.

    Returns:
        {"path", "stage", "domain", "merged", "scores", "merge_tax", ...}, as in residency.json beside the weights.

    Raises:
        UserError: What the user can mend; nothing half written stays.
    """
    from residency.runs.cli import ResidencyCLI

    folder = Path(run)
    words = ["export", "--config", str(folder / "config.yaml"), "--run_dir", str(folder)]
    given = {"stage": stage, "dtype": dtype, "output": output}
    words += [f"--{name}={value}" for name, value in given.items() if value is not None]
    flags = {"merge": merge, "overwrite": overwrite}
    found: dict[str, Any] = ResidencyCLI([*words, *(f"--{name}" for name, on in flags.items() if on)]).result
    return found


def load_run(path: str | Path) -> Run:
    """Read a finished run.

    Args:
        path: Its folder.

    Raises:
        UserError: There is no finished run.
    """
    folder = RunFolder(Path(path))
    record = folder.results()
    if record is None:
        raise UserError(
            f"{path} holds no finished run",
            why="results.json is written when a run is complete, and it is not there",
            fix="check the path, or finish the run with the command that began it",
        )
    names = ["base", *record["domains"]]
    frames = [
        _scores(folder.stage(k, name) / "scores.parquet").insert_column(0, pl.lit(k).alias("stage"))
        for k, name in enumerate(names)
    ]
    history = pl.DataFrame(folder.history(), infer_schema_length=None)
    return Run(path=Path(path), record=record, history=history, scores=pl.concat(frames))


def _scores(path: Path) -> pl.DataFrame:
    try:
        return read_parquet(path)
    except ParquetRefused as error:
        raise UserError(
            str(error),
            why="the file is damaged, or was not written by residency",
            fix="run the command that made the run again: what is damaged is made anew",
        ) from error


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
