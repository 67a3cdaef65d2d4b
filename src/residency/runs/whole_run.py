"""Whether a run is complete and its files are what was written, without torch: a study asks it of every cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from residency.core.digests import Damaged, check_files, lost_or_unreadable, unseal

__all__ = ["KEYS", "whole_record", "written_at"]

KEYS = ("cell", "status", "domains", "probes", "scores", "summary", "cost")
"""What every record of a complete run holds."""
_LARGE = (".safetensors", ".parquet")


def whole_record(path: Path) -> dict[str, Any] | None:
    """The record of a complete run; `None` if there is none, or something of it is damaged or missing.

    The content of records, configs and histories is compared with their digests; of states and scores only the size,
    because a study may have terabytes of them: whoever uses one compares all of it.

    Args:
        path: Folder of the run.

    Raises:
        UserError: A file is there and cannot be read.
    """
    try:
        record = _sealed(path / "results.json", keys=KEYS)
        for name, file in record.get("files", {}).items():
            check_files(path, {name: file})
            if name.endswith("stage.json"):
                _check_stage((path / name).parent)
    except Damaged:
        return None
    return record


def _check_stage(folder: Path) -> None:
    for name, file in _sealed(folder / "stage.json").get("files", {}).items():
        if not name.endswith(_LARGE):
            check_files(folder, {name: file})
        elif not (folder / name).is_file() or (folder / name).stat().st_size != file["bytes"]:
            raise Damaged(f"{name} is not what was written")


def _sealed(path: Path, *, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    try:
        return unseal(json.loads(path.read_bytes()), name=path.name, required=False, keys=keys)
    except OSError as error:
        raise lost_or_unreadable(error, path) from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path.name} is no record") from error


def written_at(path: Path) -> int | None:
    """When a file was written, in nanoseconds; `None` if there is none."""
    return path.stat().st_mtime_ns if path.is_file() else None
