"""The score of every row of a state, as Parquet."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from residency.core.errors import UserError
from residency.core.parquet_files import ParquetRefused, read_parquet
from residency.core.tensor_files import replace_file
from residency.engine.scoring.row_scores import Evaluation, RowScore

__all__ = ["SCORE_FIELDS", "read_scores", "write_scores"]

SCORE_FIELDS = {
    "column": pl.String,
    "row": pl.String,
    "scorer": pl.String,
    "value": pl.Float64,
    "tokens": pl.Int64,
    "weight": pl.Int64,
    "ended": pl.Boolean,
}
"""The columns of the file: those of `RowScore`."""

# Scores whose means were over tokens when the files did not say so.
_WEIGHED_BY_TOKENS = ("nll", "nll_routed", "nll_newest")


def write_scores(path: Path, scores: Evaluation) -> None:
    """Write the score of every row as Parquet, atomically."""
    frame = pl.DataFrame({f: [getattr(s, f) for s in scores] for f in SCORE_FIELDS}, schema=SCORE_FIELDS)
    replace_file(path, lambda temporary: frame.write_parquet(temporary))


def read_scores(path: Path) -> Evaluation:
    """Read them back, in order; files from before scores had weights are read as what they were.

    Raises:
        UserError: The file is damaged, or cannot be read.
    """
    try:
        frame = read_parquet(path)
        if "weight" not in frame.columns:
            weighed = pl.col("scorer").is_in(_WEIGHED_BY_TOKENS)
            frame = frame.with_columns(weight=pl.when(weighed).then(pl.col("tokens")).otherwise(1))
        if "ended" not in frame.columns:
            frame = frame.with_columns(ended=pl.lit(True))
        return [RowScore(**row) for row in frame.iter_rows(named=True)]
    except (OSError, ParquetRefused, pl.exceptions.PolarsError, TypeError) as error:
        raise UserError(
            f"cannot read the scores {path}: {' '.join(str(error).split())}",
            why="the file is missing, damaged, or was not written by residency",
            fix="run the command that made the run again: what is damaged is made anew",
        ) from error
