"""What processes keep of a domain for each other in the assets cache: who writes, what outdates it, when it goes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path

from residency.core.leases import lease

__all__ = ["delete_unused", "held", "reading_code"]

_UNUSED_DAYS = 30


@cache
def reading_code() -> str:
    """SHA-256 of our code that makes rows and tokens of files: this room, and what it is built on."""
    room, digest = Path(__file__).parent, hashlib.sha256()
    for folder in (room, room.parent / "core"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def held(path: Path, already_done: Callable[[], bool]) -> AbstractContextManager[object]:
    """A lease beside a file that is to be written; none where the folder cannot be written.

    Args:
        path: The file.
        already_done: Whether nobody need write it any more.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / ".writable").touch()
    except OSError:
        return nullcontext()
    return lease(path.with_suffix(".lease"), already_done=already_done)


def delete_unused(folder: Path, pattern: str) -> None:
    """Delete files that nobody has used for 30 days: a process that still maps one keeps its pages."""
    oldest = time.time() - _UNUSED_DAYS * 86_400
    for file in folder.glob(pattern):
        with suppress(OSError):
            if file.stat().st_mtime < oldest:
                file.unlink()
