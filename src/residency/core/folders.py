"""Folders that are there whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from residency.core.errors import UserError

__all__ = ["replace_folder"]


@contextmanager
def replace_folder(path: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its name when the block ends without an error.

    A reader sees the old folder, no folder, or the whole new one.

    Args:
        path: Final name. Missing parents are made.
        overwrite: Whether what is there may be replaced.
        marker: A file that every folder written here holds: nothing else is ever replaced.

    Raises:
        UserError: The name is taken, or the folder cannot be made.
    """
    path = path.expanduser().resolve()
    _check_free(path, overwrite=overwrite, marker=marker)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        temporary.mkdir()
    except OSError as error:
        raise UserError(
            f"{path} cannot be made: {error.strerror}",
            why="the files need a folder",
            fix="choose another one with --output, or change its permissions",
        ) from error
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


def _check_free(path: Path, *, overwrite: bool, marker: str) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / marker).is_file():
        raise UserError(
            f"{path} is there, and no export of residency (no {marker} in it)",
            why="something else would be lost",
            fix="choose a folder that does not exist yet with --output",
        )
    if not overwrite:
        raise UserError(
            f"{path} holds an earlier export",
            why="it would be lost",
            fix="add --overwrite to replace it, or choose another folder with --output",
        )


def _remove_stale(path: Path) -> None:
    """What processes that are gone left half written."""
    for kind in ("partial", "old"):
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.{kind}"):
            process = left.name.removesuffix(f".{kind}").rpartition(".")[2]
            if not (process.isdigit() and _alive(int(process))):
                shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
