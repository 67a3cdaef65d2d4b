"""Tasks for tests of executors: a function of a spec that returns an exit code, and imports nothing heavy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["alive", "gone", "note", "run_task"]

SEEN: list[str] = []


def _stop(*_: object) -> None:
    raise InterruptedError


def run_task(spec: Mapping[str, Any]) -> int:
    """Do what the spec says: leave a note of this process behind, print, wait, die, return a code."""
    print("printed by", spec.get("name"), flush=True)
    SEEN.append(str(spec.get("name")))
    note = {
        "pid": os.getpid(),
        "group": os.getpgid(0),
        "seen": SEEN,
        "environment": dict(os.environ),
        "argv": sys.argv,
    }
    if "child" in spec:
        note["child"] = subprocess.Popen(["sleep", "60"]).pid
    if spec.get("on_stop") == "finish":
        signal.signal(signal.SIGTERM, _stop)
    elif spec.get("on_stop") == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "note" in spec:
        temporary = Path(spec["note"]).with_suffix(".tmp")
        temporary.write_text(json.dumps(note))
        temporary.rename(spec["note"])
    try:
        time.sleep(spec.get("seconds", 0))
    except InterruptedError:
        return 75
    if "signal" in spec:
        os.kill(os.getpid(), spec["signal"])
    if spec.get("raise"):
        raise RuntimeError("a bug")
    return int(spec.get("code", 0))


def note(path: Path) -> dict[str, Any]:
    """What a task has left behind, as soon as it is there."""
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def gone(pid: int) -> bool:
    """Whether a process ends within a few seconds."""
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


if __name__ == "__main__":
    sys.exit(run_task(json.loads(Path(sys.argv[1]).read_text())))
