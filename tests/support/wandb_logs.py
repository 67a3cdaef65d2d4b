"""What W&B has written, read back from its files: wandb 0.31 ships no Python reader any more."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

__all__ = ["fragments", "read", "runs", "series", "temporary_home"]

_BLOCK = 32768


def temporary_home(patch: Any, folder: Path) -> None:
    """W&B's caches go to a temporary folder, and it writes offline."""
    patch.delenv("WANDB_MODE", raising=False)
    patch.delenv("WANDB_DIR", raising=False)
    for name in ("CACHE", "DATA", "CONFIG"):
        patch.setenv(f"WANDB_{name}_DIR", str(folder / name.lower()))


def records(log: Path) -> Iterator[Any]:
    """A .wandb file: 7 bytes of header, then chunks (checksum, length, type, data) in blocks of 32 KiB.

    Types as in LevelDB's log: 1 = whole, 2 = first, 3 = middle, 4 = last. A file that a kill cut off ends early.
    """
    data, at, parts = log.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if not kind:
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def read(folder: Path) -> Any:
    """What a fragment holds: run, config, history, summary, metrics, artifacts, kinds of records, exit code."""
    found: dict[str, list[Any]] = {}
    for record in records(next(folder.glob("*.wandb"))):
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    lines = [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in h.item} for h in found.get("history", [])]
    run = found["run"][0]
    summary: dict[str, Any] = {}
    for update in (u for s in found.get("summary", []) for u in s.update if u.key):
        summary[update.key] = json.loads(update.value_json)
    return SimpleNamespace(
        folder=folder,
        run=run,
        started=run.start_time.seconds + run.start_time.nanos / 1e9,
        kinds=set(found),
        config={u.key: json.loads(u.value_json) for u in run.config.update if u.key != "_wandb"},
        history=[{key: value for key, value in line.items() if not key.startswith("_")} for line in lines],
        times=[line["_timestamp"] for line in lines],
        summary=summary,
        metrics={m.name or m.glob_name: m for m in found.get("metric", [])},
        artifacts=found.get("artifact", []),
        exit_code=found["exit"][0].exit_code if "exit" in found else None,
    )


def fragments(folder: Path) -> list[Any]:
    """Every offline fragment below a folder, the oldest first."""
    wandb.teardown()  # finish() returns before an offline log is wholly on disk; the end of W&B's service waits for it
    return sorted(map(read, folder.rglob("wandb/offline-run-*")), key=lambda run: run.started)


def runs(folder: Path) -> dict[str, list[Any]]:
    """{run id: its fragments}, as a server puts them together."""
    found: dict[str, list[Any]] = {}
    for fragment in fragments(folder):
        found.setdefault(fragment.run.run_id, []).append(fragment)
    return found


def series(parts: Any, key: str, axis: str) -> list[Any]:
    """[(axis, value)] of one metric, over all fragments of a run."""
    several = parts if isinstance(parts, list) else [parts]
    return [(line[axis], line[key]) for part in several for line in part.history if key in line]
