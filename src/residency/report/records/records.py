"""What a report is made from: the records of runs and studies, read from their folders, torch left alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from residency.core.errors import UserError
from residency.core.parquet_files import read_parquet
from residency.core.text import for_terminal
from residency.core.yaml_files import parse_yaml
from residency.runs.views.flat_config import flat_config
from residency.runs.views.tables import Record, printable

__all__ = ["Entry", "Records", "read_records"]

# What of a config tells two runs apart that belong to no study, in the order of interest.
_TELLING = ("mitigation", "adapter", "objective", "stream", "backbone")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One cell: its record, and the folder for what the record does not hold.

    Args:
        record: What results.json holds; of a cell that is not done only cell, status, axes and seed.
        folder: The run's folder.
        reference: Kind of a run that a study adds to compare with (frozen, independent, joint, per_domain); `None` for
            a cell of the axes.
    """

    record: Record
    folder: Path
    reference: str | None = None

    @property
    def role(self) -> str:
        """`reference` or `train`."""
        return "train" if self.reference is None else "reference"

    @property
    def done(self) -> bool:
        """Whether the run is complete."""
        return bool(self.record.get("status") == "done")

    def config(self) -> dict[str, Any]:
        """The resolved config; empty if there is none."""
        try:
            content = parse_yaml((self.folder / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def examples(self, stage: int) -> pl.DataFrame | None:
        """The per-example scores after a stage (0 = before training): column, row, scorer, value, tokens.

        Raises:
            ParquetRefused: The file is damaged; `None` is only where there is none.
            OSError: It cannot be read.
        """
        found = sorted((self.folder / "stages").glob(f"{stage}-*/scores.parquet"))
        frame = read_parquet(found[0]) if found else None
        if frame is None or "column" not in frame.columns:
            return frame
        names = [name for name in frame["column"].unique() if isinstance(name, str) and not name.isprintable()]
        return frame.with_columns(pl.col("column").replace({name: for_terminal(name) for name in names}))

    def history(self) -> list[dict[str, Any]]:
        """The logged steps; what a kill cut off is left out, and all that follows a line that is no step."""
        lines: list[dict[str, Any]] = []
        try:
            # Only a line feed ends a line: a name may hold what Unicode calls separators.
            for text in (self.folder / "history.jsonl").read_bytes().split(b"\n"):
                line = json.loads(text)
                if not isinstance(line, dict):
                    break
                lines.append(line)
        except (OSError, ValueError, RecursionError):
            pass
        return lines


@dataclass(frozen=True, kw_only=True)
class Records:
    """Everything a report reads.

    Args:
        title: Name of the study, or of the run.
        home: Folder the report goes into by default.
        entries: The cells, done or not.
        scorer: What the comparison is about.
        subject: The axis whose values are compared; `mitigation` where there is one.
        baseline: Its value that the others are compared with.
        study: What study.yaml or plan.json say about the study; empty for runs.
    """

    title: str
    home: Path
    entries: tuple[Entry, ...]
    scorer: str
    subject: str
    baseline: str
    study: Mapping[str, Any]

    @property
    def done(self) -> list[Entry]:
        """The finished cells."""
        return [entry for entry in self.entries if entry.done]


def read_records(paths: Sequence[str | Path], *, scorer: str | None = None, baseline: str | None = None) -> Records:
    """Read runs and studies.

    Args:
        paths: Folders: of runs (results.json) or of studies (plan.json).
        scorer: What the comparison is about; the study's, else `nll`, else the first one.
        baseline: What the others are compared with; the study's, else `none`, else the first one.

    Raises:
        UserError: A folder is neither, or no cell has the scorer.
    """
    folders = [Path(path) for path in paths]
    if not folders:
        raise UserError("no folder to report on", why="a report is made from records", fix="residency report STUDY")
    entries: list[Entry] = []
    study: Mapping[str, Any] = {}
    for folder in folders:
        if (folder / "plan.json").is_file():
            plan = _json(folder / "plan.json")
            study = study or plan.get("study") or {}
            # Cells of several studies side by side are told apart by one more axis.
            several = {"study": folder.resolve().name} if len(folders) > 1 else {}
            entries += _cells(folder, plan, several)
        elif (folder / "results.json").is_file() or (folder / "config.yaml").is_file():
            entries.append(_entry(folder, {"id": folder.resolve().name, "axes": {}, "seed": None}))
        else:
            raise UserError(
                f"{folder} holds no run and no study",
                why="a run has config.yaml and results.json, a study has plan.json, and neither is there",
                fix="give folders that `residency fit` or `residency sweep` has written, such as studies/quickstart",
            )
    entries = _told_apart(entries)
    done = [entry for entry in entries if entry.done]
    scorers = list(dict.fromkeys(name for entry in done for name in entry.record.get("scores") or {}))
    chosen = scorer or study.get("scorer") or ("nll" if "nll" in scorers else next(iter(scorers), "nll"))
    if done and chosen not in scorers:
        raise UserError(
            f"no cell was scored by {printable(chosen)}",
            why=f"the scorers are {', '.join(map(printable, scorers)) or 'none'}",
            fix="choose one of them with --scorer",
        )
    subject = _subject(entries)
    values = list(dict.fromkeys(str(e.record["axes"].get(subject)) for e in entries if e.role == "train"))
    return Records(
        title=printable(study.get("name") or (folders[0].resolve().name if folders else "report")),
        home=folders[0] / "report",
        entries=tuple(entries),
        scorer=chosen,
        subject=subject,
        baseline=_baseline(baseline or study.get("baseline"), values),
        study=study,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {path}: {error}",
            why="a report is made from this file",
            fix="restore it, or run the command that wrote it again",
        ) from error
    return content if isinstance(content, dict) else {}


def _cells(folder: Path, plan: Mapping[str, Any], more: Mapping[str, str]) -> Iterator[Entry]:
    for cell in plan.get("cells") or []:
        # Names from data never become paths: a cell's folder is one name inside cells/.
        yield _entry(folder / "cells" / Path(str(cell["id"])).name, cell, more)


def _entry(folder: Path, cell: Mapping[str, Any], more: Mapping[str, str] | None = None) -> Entry:
    axes = {str(k): v for k, v in (cell.get("axes") or {}).items()} | dict(more or {})
    found = _json(folder / "results.json") if (folder / "results.json").is_file() else None
    if found and "cell" in found:
        record = found
        record["axes"] = {**(record.get("axes") or {}), **axes}
        for part in ("domains", "probes"):
            # Names become fields of charts, whose renderer a NUL ends; names of other versions may hold one.
            record[part] = [for_terminal(name) for name in record.get(part) or []]
    else:
        damage = None if found is None else "damaged: results.json names no cell"
        status = printable(damage or cell.get("status") or _failure(folder))
        record = {"cell": cell["id"], "status": status, "axes": axes, "seed": cell.get("seed")}
    # The axis says which domain as well ("independent medical"); the kind is its first word.
    told = str(record["axes"].pop("reference", None) or "").partition(" ")[0]
    return Entry(record=record, folder=folder, reference=cell.get("reference") or told or None)


def _failure(folder: Path) -> str:
    """Why a cell has no results: what its folder says, else that it is missing."""
    for name in ("failed.json", "failure.json"):
        if (folder / name).is_file():
            said = _json(folder / name)
            return f"failed: {said.get('error') or said.get('reason') or said.get('message') or 'unknown'}"
    return "begun, not finished" if (folder / "stages").is_dir() else "missing"


def _told_apart(entries: Sequence[Entry]) -> list[Entry]:
    """Cells with names of their own, and axes also where no study gave any."""
    names = Counter(str(entry.record.get("cell")) for entry in entries)
    bare = [entry for entry in entries if not entry.record["axes"] and entry.reference is None]
    axes = dict(zip(map(id, bare), _derived(bare), strict=True)) if len(bare) > 1 else {}
    found = []
    for entry in entries:
        record = {**entry.record, "axes": axes.get(id(entry), entry.record["axes"])}
        if names[str(record.get("cell"))] > 1:
            record["cell"] = entry.folder.resolve().name
        if not record["axes"] and entry.reference is None:
            record["axes"] = {"run": record["cell"]}
        found.append(replace(entry, record=record))
    return found


def _derived(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Axes of runs without a study: what differs between their configs."""
    flat = [flat_config(entry.config()) for entry in entries]
    keys = list(dict.fromkeys(key for config in flat for key in config if key != "seed"))
    differ = [key for key in keys if len({str(config.get(key)) for config in flat}) > 1]
    top = [key for key in _TELLING if key in differ] or differ[:3]
    rows = [{key: config.get(key) for key in top} for config in flat]
    seeds = [entry.record.get("seed") for entry in entries]
    if len({(str(row), str(seed)) for row, seed in zip(rows, seeds, strict=True)}) < len(rows):
        # Equal as far as can be told: no repetition of one run may pass for another seed.
        return [{**row, "run": entry.folder.resolve().name} for row, entry in zip(rows, entries, strict=True)]
    return rows


def _subject(entries: Iterable[Entry]) -> str:
    axes = list(dict.fromkeys(axis for e in entries if e.role == "train" for axis in e.record["axes"]))
    return "mitigation" if "mitigation" in axes else next((axis for axis in axes if axis != "seed"), "run")


def _baseline(wanted: str | None, values: Sequence[str]) -> str:
    return str(wanted) if wanted in values else "none" if "none" in values else next(iter(values), "none")
