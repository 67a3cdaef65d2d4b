"""Who is working on what, in a folder that several processes and machines share.

A lease only saves work: entries of the store are published by one atomic rename, so two owners of one lease (a machine
that was suspended and woke up again) would waste time and damage nothing. That is why it needs no lock manager, and
works on network file systems.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["BEAT_SECONDS", "EXPIRE_SECONDS", "lease", "owner_is_dead"]

BEAT_SECONDS = 10.0
EXPIRE_SECONDS = 90.0
"""Without a heartbeat for so long, an owner on another machine counts as dead; one on this machine is looked at."""


def _read(path: Path) -> str:
    with suppress(OSError, ValueError):
        # Never a pipe, which would not end.
        if path.is_file():
            return path.read_text(encoding="utf-8").strip()
    return ""


def _place() -> str:
    """Where a process id means this process: machine, boot, container."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return "|".join([socket.gethostname(), _read(Path("/proc/sys/kernel/random/boot_id")), space])


def _started(pid: int) -> str | None:
    """When a process of this machine was started, so that a reused id is told apart; `None` if there is none."""
    stat = _read(Path(f"/proc/{pid}/stat"))
    if stat:
        # The name (in brackets) may hold blanks; state is the first field after it, the start time the 20th.
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else fields[19]
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "unknown"


def owner_is_dead(path: Path, *, expires: float = EXPIRE_SECONDS) -> bool:
    """Whether the owner of a lease is gone.

    Args:
        path: The lease.
        expires: Seconds without heartbeat after which it is, wherever it runs.
    """
    try:
        # Of the name itself: where a link leads to says nothing about a lease.
        age = _now(path.parent) - path.lstat().st_mtime
    except FileNotFoundError:
        return False
    owner = _owner(path)
    if owner.get("place") == _place() and isinstance(owner.get("pid"), int):
        return _started(owner["pid"]) != owner.get("started")
    # A living owner sets the time of the file system; one that lies ahead of it by minutes was set by somebody else.
    return abs(age) > expires


def _owner(path: Path) -> dict[str, Any]:
    """What a lease says about its owner; nothing where it is no lease (other JSON, a folder, a link that loops)."""
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _now(folder: Path) -> float:
    """The time of the file system: clocks of machines differ."""
    probe = folder / f".now.{secrets.token_hex(6)}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _take(path: Path, text: str) -> bool:
    """Make the file with its content in one step, if it is not there."""
    mine = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        mine.write_text(text, encoding="utf-8")
        try:
            os.link(mine, path)
        except FileExistsError:
            return False
        except OSError:
            # A file system without hard links; a reader may see the file empty for a moment, and waits.
            try:
                with open(path, "x", encoding="utf-8") as handle:
                    handle.write(text)
            except FileExistsError:
                return False
        return True
    finally:
        mine.unlink(missing_ok=True)


def _break(path: Path, expires: float) -> None:
    """Remove the lease of a dead owner; of several that try, one does."""
    seen = _read(path)
    if not owner_is_dead(path, expires=expires):
        return
    grave = path.with_name(f".{path.name}.dead.{secrets.token_hex(6)}")
    with suppress(FileNotFoundError):
        os.rename(path, grave)
        if _read(grave) != seen:
            # Somebody was faster and the lease is a living one again: give it back.
            with suppress(OSError):
                os.link(grave, path)
        _remove(grave)


def _remove(grave: Path) -> None:
    """A lease, or what lay in its place; a folder only if nothing is in it."""
    try:
        grave.unlink(missing_ok=True)
    except OSError:
        with suppress(OSError):
            grave.rmdir()


@contextmanager
def lease(
    path: Path,
    *,
    already_done: Callable[[], bool] = lambda: False,
    waiting: Callable[[], None] = lambda: None,
    poll: float = 0.2,
    beat: float = BEAT_SECONDS,
    expires: float = EXPIRE_SECONDS,
) -> Iterator[bool]:
    """Hold a lease; waits for a living owner, takes over from a dead one.

    Args:
        path: Its file; the folder is made.
        already_done: Asked while waiting: what the lease is for has been done by somebody else.
        waiting: Called while waiting.
        poll: Seconds between two looks.
        beat: Seconds between two heartbeats.
        expires: Seconds without heartbeat after which an owner on another machine counts as dead.

    Yields:
        Whether the lease is held; `False` = it is already_done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pid = os.getpid()
    owner = {"place": _place(), "pid": pid, "started": _started(pid), "token": secrets.token_hex(8)}
    text = json.dumps(owner)
    done = threading.Event()
    thread = threading.Thread(target=_keep, args=(path, done, beat), daemon=True, name="residency-lease")
    # A signal may arrive between taking and holding: this process would wait for itself when it asks again.
    try:
        while not _take(path, text):
            if already_done():
                yield False
                return
            _break(path, expires)
            if os.path.lexists(path):
                waiting()
                time.sleep(poll)
        thread.start()
        yield True
    finally:
        done.set()
        if thread.is_alive():
            thread.join()
        if _read(path) == text:
            path.unlink(missing_ok=True)


def _keep(path: Path, done: threading.Event, beat: float) -> None:
    while not done.wait(beat):
        with suppress(OSError):
            os.utime(path)
