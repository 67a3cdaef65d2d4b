"""Whether files are what was written: sizes and SHA-256 beside them, compared whenever they are used again.

Three things are told apart, because what follows is different: a file that is not what was written is *damaged* and is
made again; a file that this user may not read, or that a disk does not give, *cannot be read* and is left alone; all
others are intact.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from residency.core.errors import UserError
from residency.core.guard import explain_error

__all__ = ["CannotRead", "Damaged", "Digest", "check_files", "digest_file", "digest_files", "seal", "unseal"]

Digest = Mapping[str, Any]
"""{"bytes", "sha256"} of one file."""

# Not there, or something else in its place: whoever wrote the file can write it again.
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)
_SEAL = "checksum"


class Damaged(ValueError):
    """A file is missing, or not what was written."""


class CannotRead(UserError):
    """A file may be whole, but this process cannot read it: nothing about it is known, so nothing is done to it."""


def digest_file(path: Path, *, sync: bool = False) -> dict[str, Any]:
    """Size and SHA-256 of a file.

    Args:
        path: The file.
        sync: Bring it to the disk first.

    Raises:
        Damaged: There is no regular file of that name.
        CannotRead: There is, and it cannot be read.
    """
    try:
        # A pipe would never end, and a device has no content of its own.
        if not path.is_file():
            path.lstat()
            raise Damaged(f"{path.name} is no file")
        with path.open("rb") as handle:
            if sync:
                os.fsync(handle.fileno())
            found = hashlib.file_digest(handle, "sha256").hexdigest()
            return {"bytes": handle.tell(), "sha256": found}
    except OSError as error:
        raise lost_or_unreadable(error, path) from error


def lost_or_unreadable(error: OSError, path: Path) -> Exception:
    """`Damaged` for a file that is not there, `CannotRead` for one that is."""
    if error.errno in _LOST:
        return Damaged(f"{path.name} is missing" if error.errno != errno.EISDIR else f"{path.name} is no file")
    told = explain_error(error)
    assert told is not None
    return CannotRead(f"cannot read {path}: {told.got}", why=told.why, fix=told.fix)


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{name: digest} of those of a folder's files that are there."""
    return {name: digest_file(folder / name) for name in names if (folder / name).is_file()}


def check_files(folder: Path, files: Mapping[str, Digest]) -> None:
    """Compare files with what was written.

    Args:
        folder: Where they lie.
        files: {name: digest}.

    Raises:
        Damaged: One is missing or different; the message names it.
        CannotRead: One cannot be read.
    """
    for name, file in files.items():
        if digest_file(folder / name) != dict(file):
            raise Damaged(f"{name} is not what was written")


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON record with its own checksum in it."""
    return {**record, _SEAL: _checksum(record)}


def unseal(record: Any, *, name: str, required: bool = True, keys: Iterable[str] = ()) -> dict[str, Any]:
    """The record without its checksum.

    Args:
        record: What was read.
        name: Of the file, for the message.
        required: Whether a record without checksum (of a version that wrote none) is damaged.
        keys: What it must hold.

    Raises:
        Damaged: It is no record, or does not fit its checksum.
    """
    if not isinstance(record, dict):
        raise Damaged(f"{name} is no record")
    rest = {key: value for key, value in record.items() if key != _SEAL}
    if (required or _SEAL in record) and record.get(_SEAL) != _checksum(rest):
        raise Damaged(f"{name} does not fit its checksum")
    if lacking := [key for key in keys if key not in rest]:
        raise Damaged(f"{name} has no {', '.join(lacking)}")
    return rest


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
