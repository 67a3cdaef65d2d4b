"""SIGKILL at random moments, over everything that writes at once: the same command gives equal bits in the end.

KILLS=200 pytest -m slow tests/study/test_random_kills.py      (20 by default)
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support.cli import read_json
from support.tiny_sweeps import EWC, REPLAY, write_study

KILLS = int(os.environ.get("KILLS", "20"))
AXES = {"mitigation": {"none": {}, "replay": REPLAY, "ewc": EWC(1.0)}}
PATIENCE = 300.0


class Shop:
    """A place in which commands run and are killed.

    Args:
        folder: Where they run.
        seed: Of the moments.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.draw = random.Random(seed)
        self.took = 10.0

    def start(self, *words: object) -> subprocess.Popen[bytes]:
        """A command that leads a group of its own."""
        command = [sys.executable, "-m", "residency", *map(str, words)]
        quiet = {**os.environ, "WANDB_MODE": "disabled"}
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(command, cwd=self.folder, env=quiet, stdout=log, stderr=log, start_new_session=True)

    def finish(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the end; its exit code."""
        return process.wait(timeout=PATIENCE)

    def kill(self, commands: Sequence[Sequence[object]]) -> None:
        """Start commands together and kill them, workers and all, at one moment."""
        processes = [self.start(*words) for words in commands]
        time.sleep(self.draw.uniform(0.2, 1.0) * self.took)
        for process in processes:
            for target in (process.pid, *_descendants(process.pid)):
                try:
                    os.kill(target, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait()


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [found for child in map(int, children) for found in (child, *_descendants(child))]


def scores(folder: Path) -> dict[str, Any]:
    """{cell: matrices}; a run is one cell."""
    found = sorted([*folder.glob("cells/*/results.json"), *folder.glob("results.json")])
    return {path.parent.name if "cells" in path.parts else "run": read_json(path)["scores"] for path in found}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["fit", "sweep", "two sweeps, one store", "gc beside a sweep"])
def test_equal_bits_after_random_kills(what: str, llama: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path, llama, domains="ab", steps=3, axes=AXES, seeds=[0, 1])
    shop = Shop(tmp_path, seed=len(what))
    options = ("--workers", 2, "--threads", 1)
    fit = ["fit", "--config", tmp_path / "base.yaml", "--checkpoint_every_n_steps=1"]
    whole, killed, store = tmp_path / "whole", tmp_path / "killed", tmp_path / "store"
    if what == "fit":
        reference, commands = [*fit, "--run_dir", whole], [[*fit, "--run_dir", killed]]
    else:
        reference = ["sweep", study, "--study_dir", whole, *options]
        commands = [["sweep", study, "--study_dir", killed, "--store", store, *options]]
    if what.startswith("two"):
        commands.append(["sweep", study, "--study_dir", tmp_path / "other", "--store", store, *options])
    if what.startswith("gc"):
        commands.append(["store", "gc", store, "--unused", "0", "--yes"])
    start = time.monotonic()
    assert shop.finish(shop.start(*reference)) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    shop.took = time.monotonic() - start
    for _ in range(KILLS // 4):
        shop.kill(commands)
        if what.startswith("gc"):
            shop.finish(shop.start(*commands[-1]))
    ends = [shop.finish(process) for process in [shop.start(*words) for words in commands[:2]]]
    assert ends[0] == 0, (tmp_path / "log.txt").read_text()[-3000:]
    assert scores(whole)
    assert scores(killed) == scores(whole)
    if what.startswith("two"):
        assert ends[1] == 0
        assert scores(tmp_path / "other") == scores(whole)
