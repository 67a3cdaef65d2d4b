"""SIGKILL at random moments, over everything that writes at once: the same command gives equal bits in the end.

KILLS=200 pytest -m slow tests/study/test_random_kills.py      (40 by default, a quarter of them for each kind)
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.cli import read_json
from support.forked_commands import descendants, kill, start
from support.tiny_sweeps import EWC, REPLAY, write_study

KILLS = int(os.environ.get("KILLS", "40"))
AXES = {"mitigation": {"none": {}, "replay": REPLAY, "ewc": EWC(1.0)}}
PATIENCE = float(os.environ.get("PATIENCE", "300"))
KINDS = ("fit", "sweep", "two sweeps, one store", "gc beside a sweep")


class Rounds:
    """A piece of work that is begun, killed and begun again until it is done; then another one.

    Args:
        folder: Where all of it lies.
        kind: What runs.
        study: The study file.
        seed: Of the moments and the victims.
    """

    def __init__(self, folder: Path, kind: str, study: Path, seed: str) -> None:
        self.folder, self.kind, self.study = folder, kind, study
        self.draw = random.Random(seed)
        self.log = folder / "log.txt"
        self.took = 0.0
        self.hits = 0
        self.start(["--version"]).join(PATIENCE)  # what is imported once is no part of a run
        begin = time.monotonic()
        self.expected = self.whole(self.commands("whole")[:1])["whole"]
        self.took = time.monotonic() - begin
        assert self.expected

    def commands(self, name: str) -> list[list[object]]:
        """Command lines that run side by side in one round."""
        if self.kind == "fit":
            base = self.folder / "base.yaml"
            return [["fit", "--config", base, "--checkpoint_every_n_steps=1", "--run_dir", self.folder / name]]
        store = self.folder / f"store-{name}"
        options = ["--store", store, "--workers", 2, "--threads", 1]
        sweep: list[object] = ["sweep", self.study, "--study_dir"]
        made = [[*sweep, self.folder / name, *options]]
        if self.kind.startswith("two"):
            made.append([*sweep, self.folder / f"{name}-other", *options])
        return made

    def start(self, words: Sequence[object]) -> BaseProcess:
        return start(words, cwd=self.folder, log=self.log)

    def whole(self, commands: Sequence[Sequence[object]]) -> dict[str, dict[str, Any]]:
        """Run to the end; {folder: what it holds}."""
        for process in [self.start(words) for words in commands]:
            process.join(PATIENCE)
            assert process.exitcode == 0, self.log.read_text()[-3000:]
        return {path.name: results(path) for path in self.folder.iterdir() if path.name.startswith(("whole", "round"))}

    def attempt(self, commands: Sequence[Sequence[object]]) -> None:
        """Start all together, and kill at a random moment: everything, or one process of them and then everything."""
        processes = [self.start(words) for words in commands]
        if self.kind.startswith("gc"):
            self.wait(processes)
            store = commands[0][commands[0].index("--store") + 1]
            processes.append(self.start(["store", "gc", store, "--unused", "0", "--yes"]))
        if self.draw.random() < 0.3:
            self.wait(processes)
            self.hit([self.draw.choice(found)] if (found := tree(processes)) else [])
        self.wait(processes)
        self.hit(tree(processes))
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode in (0, -9), self.log.read_text()[-3000:]

    def wait(self, processes: Sequence[BaseProcess]) -> None:
        """Until a random moment, or until all have ended."""
        end = time.monotonic() + self.draw.uniform(0, 0.8) * self.took
        while time.monotonic() < end and any(process.is_alive() for process in processes):
            time.sleep(0.01)

    def hit(self, pids: Sequence[int]) -> None:
        kill(pids)
        self.hits += bool(pids)


def tree(processes: Sequence[BaseProcess]) -> list[int]:
    """Living processes and their descendants."""
    living = [process.pid for process in processes if process.is_alive() and process.pid]
    return [found for pid in living for found in (pid, *descendants(pid))]


def results(folder: Path) -> dict[str, Any]:
    """{cell: its scores} and {file of tensors: digest}; a run is one cell."""
    found: dict[str, Any] = {
        str(path.parent.relative_to(folder)): read_json(path)["scores"]
        for path in [*folder.glob("cells/*/results.json"), *folder.glob("results.json")]
    }
    tensors = {path for pattern in ("stages", "cells/*/stages") for path in folder.glob(f"{pattern}/**/*.safetensors")}
    return {**found, **{str(path.relative_to(folder)): digest(path) for path in tensors}}


def digest(path: Path) -> str:
    """Of names and bits of tensors: what lies beside them holds seconds."""
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        found.update(name.encode() + tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Names of what is missing, too much or not the same."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


@pytest.mark.slow
@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_bits_after_random_kills(kind: str, llama: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path, llama, domains="ab", steps=3, axes=AXES, seeds=[0])
    rounds = Rounds(tmp_path, kind, study, seed=kind)
    begun = 0
    while rounds.hits < KILLS // len(KINDS):
        begun += 1
        commands, before = rounds.commands(f"round{begun}"), rounds.hits
        for _ in range(4):
            rounds.attempt(commands)
        found = rounds.whole(commands)
        others = {name: differences(held, rounds.expected) for name, held in found.items() if held != rounds.expected}
        assert not others, f"round {begun}, kills {before} to {rounds.hits}"
        print(f"{kind}: {rounds.hits} kills in {begun} rounds, equal bits", flush=True)
    print(f"{kind}: {rounds.took:.1f} s for one that is not killed")
