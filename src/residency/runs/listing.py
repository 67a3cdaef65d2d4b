"""Runs as things: found, read as far as they are, shown, compared, removed. Imports no torch.

A run is a folder with `config.yaml`; stages that are complete have `stage.json`, a complete run has `results.json`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from residency.core.digests import CannotRead, lost_or_unreadable, unseal
from residency.core.errors import UserError
from residency.core.yaml_files import read_yaml
from residency.runs.whole_run import KEYS

__all__ = ["RunSummary", "find_runs", "partial_matrix", "read_run", "remove_run"]

Status = Literal["done", "unfinished"]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What can be said about a run without its tensors.

    Args:
        path: Its folder.
        status: `done`, or `unfinished`: stopped, failed, or still running.
        stages: Complete stages; row 0 is not one.
        domains: In learning order; those of its config.
        adapter: Short name of its class, or of PEFT's config.
        mitigations: Their names.
        seed: Its seed.
        scores: {scorer: {higher_is_better, R}}: as many rows as are complete.
        summary: {scorer: {average, learning, bwt, forgetting, ...}} of a finished run.
        size: Bytes of its files.
        modified: Time of its newest stage, seconds since 1970.
    """

    path: Path
    status: Status
    stages: int
    domains: Sequence[str]
    adapter: str
    mitigations: Sequence[str]
    seed: int
    scores: Mapping[str, Any]
    summary: Mapping[str, Mapping[str, float | None]]
    size: int
    modified: float

    def figure(self, scorer: str, metric: str) -> float | None:
        """A metric of the summary; `average` and `learning` in the scorer's own direction."""
        value = (self.summary.get(scorer) or {}).get(metric)
        if value is None or metric not in ("average", "learning"):
            return value
        return value if self.scores[scorer]["higher_is_better"] else -value


def find_runs(folders: Sequence[Path]) -> list[RunSummary]:
    """Every run in or below these folders, the newest last.

    Args:
        folders: Of runs, of studies, or above them; what is not there holds nothing.
    """
    found = {path.parent: None for folder in folders for path in _configs(folder)}
    return sorted((read_run(path) for path in found), key=lambda run: run.modified)


def _configs(folder: Path) -> Iterator[Path]:
    for pattern in ("config.yaml", "*/config.yaml", "cells/*/config.yaml", "*/cells/*/config.yaml"):
        yield from (path for path in sorted(folder.glob(pattern)) if _is_run(path.parent))


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and ((folder / "stages").is_dir() or (folder / ".lock").exists())


def read_run(path: Path) -> RunSummary:
    """Read a run, finished or not.

    A damaged record counts as missing, as it does for the command that goes on with the run.

    Raises:
        UserError: There is no run in that folder, or a file of it cannot be read.
    """
    if not _is_run(path):
        raise UserError(
            f"{path} holds no run",
            why="a run has config.yaml and stages/",
            fix="`residency ls` lists the runs below a folder; by default those in runs and studies",
        )
    config = read_yaml(path / "config.yaml", what="the run")
    record = _record(path / "results.json", keys=KEYS)
    model, data = config.get("model") or {}, config.get("data") or {}
    domains = record["domains"] if record else list(data.get("order") or data.get("domains") or ())
    rows = _rows(path)
    files = [file for file in path.rglob("*") if file.is_file()]
    return RunSummary(
        path=path,
        status="done" if record else "unfinished",
        stages=max(len(rows) - 1, 0),
        domains=domains,
        adapter=_adapter(model.get("adapter") or {}),
        mitigations=list(model.get("mitigations") or {}),
        seed=int(config.get("seed_everything") or 0),
        scores=record["scores"] if record else partial_matrix(rows, [*domains, *(data.get("probes") or {})]),
        summary=record["summary"] if record else {},
        size=sum(file.stat().st_size for file in files),
        modified=max((file.stat().st_mtime for file in files), default=0.0),
    )


def _rows(path: Path) -> list[Mapping[str, Any]]:
    """The records of row 0, 1, ... up to the first that is missing or damaged."""
    numbered = {
        int(match[1]): file
        for file in (path / "stages").glob("*/stage.json")
        if (match := re.match(r"(\d+)-", file.parent.name))
    }
    rows: list[Mapping[str, Any]] = []
    while len(rows) in numbered and (record := _record(numbered[len(rows)], keys=("stage", "means"))) is not None:
        rows.append(record)
    return rows


def partial_matrix(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Any]:
    """Score matrices of the stages that are complete.

    Args:
        rows: Records of row 0, 1, ..., each with `means`.
        columns: Domains in order, then probes.

    Returns:
        {scorer: {R}}; a missing cell is `None`.
    """
    scorers = dict.fromkeys(scorer for row in rows for scorer in row["means"])
    return {
        scorer: {"R": [[row["means"].get(scorer, {}).get(column) for column in columns] for row in rows]}
        for scorer in scorers
    }


def _adapter(config: Mapping[str, Any]) -> str:
    inner = (config.get("init_args") or {}).get("config") or {}
    named = inner.get("class_path") if isinstance(inner, Mapping) else None
    return str(named or config.get("class_path") or "?").rpartition(".")[2].removesuffix("Config")


def remove_run(path: Path) -> int:
    """Delete the folder of a run; states that it shares with others stay in their store.

    Returns:
        Bytes freed.

    Raises:
        UserError: There is no run in that folder, or a process is at work in it.
    """
    run = read_run(path)
    try:
        with FileLock(path / ".lock", timeout=0):
            shutil.rmtree(path)
    except Timeout as error:
        raise UserError(
            f"{path} is in use by another process",
            why="it would go on writing into a folder that is gone",
            fix="stop it first",
        ) from error
    return run.size


def _record(path: Path, *, keys: tuple[str, ...]) -> dict[str, Any] | None:
    """The record in a file; `None` if there is none, or it is not what was written."""
    try:
        return unseal(json.loads(path.read_bytes()), name=path.name, required=False, keys=keys)
    except (ValueError, RecursionError):
        return None
    except OSError as error:
        found = lost_or_unreadable(error, path)
        if isinstance(found, CannotRead):
            raise found from error
        return None
