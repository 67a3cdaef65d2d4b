"""What of a run W&B has been told: one id for all processes and attempts, and nothing is told twice."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from residency.core.tensor_files import append_line, read_lines, write_lines

__all__ = ["JOURNAL", "Journal"]

JOURNAL = "wandb.jsonl"


class Journal:
    """`wandb.jsonl` in a run's folder: the id of its W&B run, then a line per thing that W&B was told.

    The stages of a cell are made by processes of their own, some of them at the same time. Whoever holds the journal
    writes; whoever does not get it leaves what it has to the next one.

    Args:
        folder: Of the run.
        names: Study and cell, for instance: what the id is made of, beside a random part that keeps a folder that is
            made again from being mixed with the earlier W&B run.
    """

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self.path = folder / JOURNAL
        self.names = names
        self.steps: set[tuple[int, int]] = set()
        """(stage, step) that was told."""
        self.done: set[str] = set()
        """Rows (`row 0`), and the end (`finished`)."""
        self._id: str | None = None
        self._opened = 0.0
        self._lock = FileLock(folder / f".{JOURNAL}.lock")

    @property
    def id(self) -> str:
        """Of the W&B run; one that a W&B agent has given counts more."""
        assert self._id is not None, "the journal is not open"
        return os.environ.get("WANDB_RUN_ID") or self._id

    def open(self, *, wait: float) -> bool:
        """Take the journal and read it.

        Args:
            wait: Seconds to wait for another process.

        Returns:
            Whether this process holds it now.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=wait)
        except Timeout:
            return False
        self._read()
        # W&B names the folder of a fragment by second and id: two of the same second would be one.
        while int(time.time()) == int(self._opened):
            time.sleep(0.02)
        if self._id is None:
            text = json.dumps([*self.names, secrets.token_hex(8)])
            self._id = hashlib.sha256(text.encode()).hexdigest()[:16]
            self._write({"id": self._id})
        self._write({"opened": round(time.time(), 3)})
        return True

    def begun(self, fragment: Path | None) -> None:
        """Where W&B writes offline what this process tells; `None` online, where it is told at once."""
        self._write({"fragment": None if fragment is None else str(fragment)})

    def close(self) -> None:
        """Everything is written; others may go on."""
        self._write({"closed": True})
        self._lock.release()

    def step(self, stage: int, step: int) -> bool:
        """Whether a step is new; from now on it is not."""
        if (stage, step) in self.steps:
            return False
        self.steps.add((stage, step))
        self._write({"stage": stage, "step": step})
        return True

    def first(self, what: str) -> bool:
        """Whether something is new; from now on it is not."""
        if what in self.done:
            return False
        self.done.add(what)
        self._write({"told": what})
        return True

    def finished(self) -> bool:
        """Whether a W&B run shows the run to its end; asked without holding the journal."""
        lines = read_lines(self.path)
        return any(line.get("told") == "finished" for line in lines) and "closed" in lines[-1]

    def _read(self) -> None:
        lines = read_lines(self.path)
        cut = self.path.is_file() and self.path.read_bytes().count(b"\n") != len(lines)
        begins = max((at for at, line in enumerate(lines) if "opened" in line), default=len(lines))
        if cut or not any("closed" in line for line in lines[begins:]):
            # A line that was cut off would swallow the next one; and what a killed process has told offline is in no
            # file that can be relied on, so its fragment goes, and the next process tells it again.
            lost = lines[begins:]
            fragment = next((line["fragment"] for line in lost if line.get("fragment")), None)
            if fragment is not None:
                shutil.rmtree(fragment, ignore_errors=True)
                lines = lines[:begins]
            write_lines(self.path, lines)
        for line in lines:
            self._id = line.get("id") or self._id
            self._opened = line.get("opened", self._opened)
            if "step" in line:
                self.steps.add((line["stage"], line["step"]))
            if "told" in line:
                self.done.add(line["told"])

    def _write(self, line: Mapping[str, Any]) -> None:
        # Not synced to the disk: it survives a kill, and what a power cut takes is told again.
        append_line(self.path, line)
