"""A run that lies on disk, as tables: finished, or as far as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from residency.core.errors import UserError
from residency.core.parquet_files import ParquetRefused, read_parquet
from residency.runs.folder import RunFolder
from residency.runs.listing import read_run
from residency.runs.listing_command import describe
from residency.runs.score_files import SCORE_FIELDS

__all__ = ["Run", "load_run"]


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
