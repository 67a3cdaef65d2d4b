"""The same verbs for a notebook or a script, and finished runs and studies as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from residency.core.errors import UserError
from residency.core.parquet_files import ParquetRefused, read_parquet
from residency.core.tensor_files import read_json
from residency.runs.export.push import push
from residency.runs.folder import RunFolder
from residency.runs.listing import RunSummary, find_runs, read_run, remove_run
from residency.runs.listing_command import describe
from residency.runs.score_files import SCORE_FIELDS
from residency.study.starter.command import init

__all__ = [
    "Run",
    "StudyRuns",
    "compare",
    "export",
    "fit",
    "init",
    "list_runs",
    "load_run",
    "load_study",
    "predict",
    "push",
    "remove_run",
    "sweep",
]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, as far as it is.

    Args:
        path: Its folder.
        record: What results.json holds: scores, summary, cost, provenance. Of an unfinished run: status, domains, seed
            and the rows of scores that there are.
        history: One row per logged step: stage, domain, step, stream_step, loss, loss/task, ...
        scores: One row per scored example: stage (0 = before training), column (domain or probe), row, scorer, value,
            tokens, weight (with which the mean of a column weighs the row).
    """

    path: Path
    record: Mapping[str, Any]
    history: pl.DataFrame
    scores: pl.DataFrame

    def __repr__(self) -> str:
        return describe(read_run(self.path))


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


def fit(config: Mapping[str, Any] | str | Path, *, run_dir: str | Path | None = None) -> dict[str, Any]:
    """Train a stream, or go on with it, as `residency fit --config CONFIG --run_dir RUN_DIR` does.

    Args:
        config: Keys and values as in a config file, the path of one, or the name of a preset.
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


def predict(
    run: str | Path,
    *,
    stage: int | None = None,
    domain: str | None = None,
    limit: int | None = None,
    prompts: str | Path | None = None,
) -> list[Mapping[str, str]]:
    """Let a saved stage write, as `residency predict RUN` does.

    Args:
        run: Folder of the run.
        stage: 0 = base, 1 ... T; the last one that is saved by default.
        domain: Whose test rows, and whose template; the first one by default.
        limit: How many rows; all by default.
        prompts: File of prompts to use instead of the test rows.

    Returns:
        [{"row", "prompt", "completion", "written"}].

    Raises:
        UserError: What the user can mend.
    """
    from residency.runs.cli import ResidencyCLI
    from residency.runs.saved_stage import predict_saved

    folder = Path(run)
    words = ["predict", "--config", str(folder / "config.yaml"), "--run_dir", str(folder)]
    cli = ResidencyCLI(words, run=False)
    return predict_saved(
        module=cli.model,
        data=cli.datamodule,
        folder=cli.folder,
        stage=stage,
        seed=cli.settings.seed,
        domain=domain,
        limit=limit,
        prompts=None if prompts is None else str(prompts),
        device=cli.trainers.root_device,
    )


def list_runs(*folders: str | Path) -> list[RunSummary]:
    """Every run in or below some folders, unfinished ones too, the newest last, as `residency ls` lists them.

    Args:
        folders: `runs` and `studies` by default.
    """
    return find_runs([Path(folder) for folder in folders or ("runs", "studies")])


def compare(folders: Sequence[str | Path], *, scorer: str = "nll") -> pl.DataFrame:
    """One row per run below these folders, with the figures of one scorer; null where a run is not finished."""
    rows = [
        {
            "path": str(run.path),
            "status": run.status,
            "stages": run.stages,
            "adapter": run.adapter,
            "mitigations": "+".join(run.mitigations),
            "seed": run.seed,
            **{metric: run.figure(scorer, metric) for metric in ("average", "learning", "bwt", "forgetting")},
        }
        for run in list_runs(*folders)
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def load_run(path: str | Path) -> Run:
    """Read a run, finished or as far as it is.

    Args:
        path: Its folder.

    Raises:
        UserError: There is no run.
    """
    folder = RunFolder(Path(path))
    record = folder.results() or _partial_record(Path(path))
    names = ["base", *record["domains"]]
    files = [folder.stage(k, name) / "scores.parquet" for k, name in enumerate(names)]
    frames = [
        _scores(file).insert_column(0, pl.lit(k).alias("stage"))
        for k, file in enumerate(files)
        if (file.parent / "stage.json").is_file()
    ]
    history = pl.DataFrame(folder.history(), infer_schema_length=None)
    scores = pl.concat(frames) if frames else pl.DataFrame(schema={"stage": pl.Int32, **SCORE_FIELDS})
    return Run(path=Path(path), record=record, history=history, scores=scores)


def _partial_record(path: Path) -> dict[str, Any]:
    run = read_run(path)
    return {
        "cell": path.name,
        "status": run.status,
        "seed": run.seed,
        "domains": list(run.domains),
        "scores": run.scores,
        "summary": {},
    }


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
