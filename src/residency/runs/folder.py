"""The folder of one run: the truth on disk that everything else is a view of (design, section 7)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from filelock import FileLock, Timeout

from residency.core.errors import UserError
from residency.core.tensor_files import (
    load_tree,
    read_json,
    read_lines,
    replace_file,
    save_tree,
    write_json,
    write_lines,
)
from residency.engine.scoring.evaluation import Evaluation, RowScore, means

__all__ = ["RunFolder", "read_scores", "write_scores"]

SCHEMA = 1
# Scores whose means were over tokens when the files did not say so.
_WEIGHED_BY_TOKENS = ("nll", "nll_routed", "nll_newest")
# What may differ between the call that started a run and the one that goes on with it.
_FREE_KEYS = ("run_dir", "name", "store", "wandb", "checkpoint_every_n_steps", "progress")


class RunFolder:
    """Paths, atomic writes and the order of completion of one run.

    A stage is trained when `state.safetensors` is there, complete when `stage.json` is; a run is complete when
    `results.json` is. Each is written last, whole, or not at all.

    Args:
        path: The folder; made when first written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process writes a run.

        Raises:
            UserError: Another living process does, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be made: {error.strerror}",
                why="the files of a run need a folder",
                fix="choose another --run_dir",
            ) from error
        try:
            with FileLock(self.path / ".lock", timeout=0):
                # Nobody else writes here now, so these are what a killed process left half written.
                for stale in self.path.rglob(".*.tmp"):
                    stale.unlink(missing_ok=True)
                yield
        except Timeout as error:
            raise UserError(
                f"{self.path} is in use by another process",
                why="two processes would overwrite each other's stages",
                fix="wait for it, stop it, or choose another --run_dir",
            ) from error

    def stage(self, k: int, domain: str) -> Path:
        """Folder of the k-th stage (0 = before training); the name is safe whatever the domain is called."""
        safe = re.sub(r"[^A-Za-z0-9_-]+", "_", domain)[:60].strip("_") or "domain"
        return self.path / "stages" / f"{k}-{safe}"

    # -- config ---------------------------------------------------------------------------------------------------

    def keep_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved config, or compare with the one that is there once a stage is.

        Raises:
            UserError: The folder belongs to a run with another config.
        """
        path = self.path / "config.yaml"
        if path.is_file() and self._begun():
            old = yaml.safe_load(path.read_text(encoding="utf-8"))
            different = sorted(_differences(_fixed(old), _fixed(config)))
            if different:
                raise UserError(
                    f"{self.path} holds a run with another config; different: {', '.join(different[:6])}",
                    why="its stages were trained with those values and cannot be mixed with new ones",
                    fix="choose another --run_dir (or --name), or go on with "
                    f"`residency fit --config {path} --run_dir {self.path}`",
                )
            return
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        replace_file(path, lambda temporary: _write(temporary, text))

    def _begun(self) -> bool:
        """Whether anything depends on the config: a mistake found before the first score leaves nothing behind."""
        return any(file.suffix != ".tmp" for file in (self.path / "stages").glob("*/*"))

    # -- stages ---------------------------------------------------------------------------------------------------

    def save_state(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Write what the stage left behind: weights, mitigations' state, costs."""
        save_tree(folder / "state.safetensors", state)

    def load_state(self, folder: Path) -> dict[str, Any]:
        """Read it back."""
        return load_tree(folder / "state.safetensors")

    def complete_stage(self, folder: Path, scores: Evaluation, facts: Mapping[str, Any]) -> None:
        """Write the scores of every example, then the record that marks the stage complete."""
        write_scores(folder / "scores.parquet", scores)
        write_json(folder / "stage.json", {**facts, "means": means(scores)})
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)

    def completed(self, folder: Path) -> dict[str, Any] | None:
        """The record of a complete stage, or `None`."""
        path = folder / "stage.json"
        return read_json(path) if path.is_file() else None

    def scores(self, folder: Path) -> Evaluation:
        """The per-example scores of a stage."""
        return read_scores(folder / "scores.parquet")

    # -- history --------------------------------------------------------------------------------------------------

    @property
    def history_path(self) -> Path:
        """`history.jsonl`."""
        return self.path / "history.jsonl"

    def history(self) -> list[dict[str, Any]]:
        """All logged steps; a last line that a kill cut off is dropped."""
        return read_lines(self.history_path)

    def trim_history(self, *, stage: int, step: int) -> None:
        """Forget the steps after a point from which training starts again."""
        lines = self.history()
        kept = [line for line in lines if (line["stage"], line["step"]) <= (stage, step)]
        if lines != kept or self.history_path.is_file():
            write_lines(self.history_path, kept)

    def add_history(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Put a stage's lines at the end, all or none."""
        write_lines(self.history_path, [*self.history(), *lines])

    # -- results --------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any] | None:
        """The finished record, or `None`."""
        path = self.path / "results.json"
        return read_json(path) if path.is_file() else None

    def complete(self, record: Mapping[str, Any]) -> None:
        """Write the record that marks the run complete."""
        write_json(self.path / "results.json", {"schema": SCHEMA, **record})


def write_scores(path: Path, scores: Evaluation) -> None:
    """Write the score of every row as Parquet, atomically."""
    fields = {
        "column": pl.String,
        "row": pl.String,
        "scorer": pl.String,
        "value": pl.Float64,
        "tokens": pl.Int64,
        "weight": pl.Int64,
    }
    frame = pl.DataFrame({f: [getattr(s, f) for s in scores] for f in fields}, schema=fields)
    replace_file(path, lambda temporary: frame.write_parquet(temporary))


def read_scores(path: Path) -> Evaluation:
    """Read them back, in order; files from before scores had weights are read as what they were."""
    frame = pl.read_parquet(path)
    if "weight" not in frame.columns:
        weighed = pl.col("scorer").is_in(_WEIGHED_BY_TOKENS)
        frame = frame.with_columns(weight=pl.when(weighed).then(pl.col("tokens")).otherwise(1))
    return [RowScore(**row) for row in frame.iter_rows(named=True)]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _FREE_KEYS}


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif old != new:
        yield prefix
