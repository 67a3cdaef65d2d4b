"""Folders that residency made say so, by a small file; nothing is written into or deleted from one that does not.

A path on a command line may lead anywhere: to a home folder, to a project with `data/` and `models/` of its own. So
whoever writes many files claims the folder first, and whoever deletes asks for the marker.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from residency.core.errors import UserError

__all__ = ["FolderKind", "check_place", "claim", "is_marked", "is_marker", "owns"]

_KEY = "residency"


@dataclass(frozen=True, kw_only=True)
class FolderKind:
    """What a folder is for.

    Args:
        name: `run`, `study`, `store`, `report`.
        option: How its place is chosen, for messages.
        proof: Whether a folder without marker was made by residency before there were markers, by what it holds.
        passing: Names that do not count when a folder is called empty: what a lock leaves.
    """

    name: str
    option: str
    proof: Callable[[Path], bool] = lambda path: False
    passing: frozenset[str] = frozenset({".lock"})

    @property
    def marker(self) -> str:
        """Name of the marker in the folder."""
        return f"{self.name}.json"


def is_marked(path: Path, kind: FolderKind) -> bool:
    """Whether a folder has the marker of its kind. A marker of something else, or a damaged one, is none."""
    try:
        content = json.loads((path / kind.marker).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get(_KEY) == kind.name


def owns(path: Path, kind: FolderKind) -> bool:
    """Whether residency made a folder: it has the marker, or what it holds proves it."""
    return path.is_dir() and (is_marked(path, kind) or kind.proof(path))


def claim(path: Path, kind: FolderKind, *, overwrite: bool = False) -> bool:
    """Make a folder one of residency's, before anything else is written into it.

    Args:
        path: The folder; made if it is missing.
        kind: What it is for.
        overwrite: Take a folder that holds something else, too.

    Returns:
        Whether it was new: nothing was in it.

    Raises:
        UserError: Something else lies there; nothing has been touched.
        OSError: It cannot be made or written.
    """
    fresh = check_place(path, kind, overwrite=overwrite)
    if not is_marked(path, kind):
        path.mkdir(parents=True, exist_ok=True)
        _write_marker(path, kind)
    return fresh


def _write_marker(path: Path, kind: FolderKind) -> None:
    """Write a marker under another name and rename it: whoever claims the folder meanwhile never reads half of it."""
    temporary = path / f".{kind.marker}.{secrets.token_hex(8)}.tmp"
    try:
        temporary.write_text(json.dumps({_KEY: kind.name, "schema": 1}) + "\n", encoding="utf-8")
        os.replace(temporary, path / kind.marker)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def is_marker(name: str, kind: FolderKind) -> bool:
    """Whether a file's name is that of a marker, or of one that is being written."""
    return name == kind.marker or (name.startswith(f".{kind.marker}.") and name.endswith(".tmp"))


def check_place(path: Path, kind: FolderKind, *, overwrite: bool = False) -> bool:
    """See that `claim` would take a folder; nothing is written.

    Args:
        path: The folder.
        kind: What it is for.
        overwrite: Whether something else may lie there.

    Returns:
        Whether it is new, or nothing is in it.

    Raises:
        UserError: Something else lies there.
        OSError: It cannot be looked at.
    """
    if path.exists() and not path.is_dir():
        raise UserError(
            f"{path} is a file",
            why=f"a {kind.name} is a folder",
            fix=f"choose another place with {kind.option}",
        )
    if is_marked(path, kind):
        return False
    names = [child.name for child in path.iterdir()] if path.is_dir() else []
    # A file of the marker's name that is not the marker is somebody's own.
    held = sorted(n for n in names if n not in kind.passing and (n == kind.marker or not is_marker(n, kind)))
    # The marker is the first file that a claim leaves: where others claimed the folder since, it is there by now.
    if held and is_marked(path, kind):
        return False
    if held and not overwrite and not kind.proof(path):
        raise UserError(
            f"{path} holds {', '.join(held[:4])}{' ...' if held[4:] else ''}, and no {kind.name} of residency "
            f"(no {kind.marker})",
            why="files of something else could be overwritten or deleted",
            fix=f"choose a new or an empty folder with {kind.option}, or add --overwrite to use this one",
        )
    return not held
