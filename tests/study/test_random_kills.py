"""SIGKILL at random moments, over everything that writes at once: the same command gives equal bits in the end.

KILLS=200 pytest -m slow tests/study/test_random_kills.py      (40 by default, a quarter of them for each kind)
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from residency.core.yaml_files import read_yaml
from support.cli import read_json, write_yaml
from support.forked_commands import descendants, kill, stacks, standing_in, start
from support.tiny_sweeps import EWC, REPLAY, write_study

KILLS = int(os.environ.get("KILLS", "40"))
# States of two mitigations in one cell; a stage of the other cell is shared by nobody but the other sweep.
AXES = {"mitigation": {"none": {}, "both": {**REPLAY, **EWC(1.0)}}}
PATIENCE = float(os.environ.get("PATIENCE", "600"))
"""Seconds after which a command that has not ended is taken to hang: twenty times what it takes on a busy machine."""
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
        self.join([self.start(["--version"])], (0,))  # What is imported once is no part of a run.
        begin = time.monotonic()
        self.expected = self.whole(self.commands("whole")[:1])["whole"]
        self.took = time.monotonic() - begin
        assert self.expected

    def commands(self, name: str) -> list[list[object]]:
        """Command lines that run side by side in one round."""
        if self.kind == "fit":
            return [["fit", "--config", self.folder / "base.yaml", "--run_dir", self.folder / name]]
        store = self.folder / f"store-{name}"
        options = ["--store", store, "--workers", 2, "--threads", 1]
        sweep: list[object] = ["sweep", self.study, "--study_dir"]
        made = [[*sweep, self.folder / name, *options]]
        if self.kind.startswith("two"):
            made.append([*sweep, self.folder / f"{name}-other", *options])
        return made

    def start(self, words: Sequence[object]) -> BaseProcess:
        return start(words, cwd=self.folder, log=self.log)

    def join(self, processes: Sequence[BaseProcess], codes: Collection[int]) -> None:
        """Wait for their ends; what hangs tells where."""
        end = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.exitcode is None:
                told = stacks(self.folder, [self.log, *self.folder.glob("*/logs/*.log")])
                kill(standing_in(self.folder))
                pytest.fail(f"{process.pid} has not ended within {PATIENCE:.0f} s\n{told}")
            assert process.exitcode in codes, self.log.read_text()[-3000:]

    def whole(self, commands: Sequence[Sequence[object]]) -> dict[str, dict[str, Any]]:
        """Run to the end; {folder: what it holds}."""
        self.join([self.start(words) for words in commands], (0,))
        option = "--run_dir" if self.kind == "fit" else "--study_dir"
        return {path.name: results(path) for words in commands for path in [Path(str(words[words.index(option) + 1]))]}

    def attempt(self, commands: Sequence[Sequence[object]]) -> bool:
        """Start all together and kill at random moments; whether anything was killed.

        Up to two times one process dies alone (a worker, the server of workers, a sweep), then all that are left.
        """
        before, processes = self.hits, [self.start(words) for words in commands]
        if self.kind.startswith("gc"):
            self.wait(processes, self.took / 2)
            store = Path(str(commands[0][commands[0].index("--store") + 1]))
            while not (store / "store.json").is_file() and processes[0].is_alive():
                time.sleep(0.01)
            processes.append(self.start(["store", "gc", store, "--unused", "0", "--yes"]))
            self.wait(processes, 1.0)
            self.hit(processes, alone=self.draw.random() < 0.5)
        for _ in range(self.draw.choice((0, 0, 1, 2)) if self.kind != "fit" else 0):
            self.wait(processes, self.took)
            self.hit(processes, alone=True)
        self.wait(processes, self.took)
        self.hit(processes, alone=False)
        self.join(processes, (0, -signal.SIGKILL))
        return self.hits > before

    def wait(self, processes: Sequence[BaseProcess], seconds: float) -> None:
        """Until a random moment within so many seconds, or until all have ended.

        Early ones are drawn more often: what is left of the work becomes less from attempt to attempt.
        """
        end = time.monotonic() + self.draw.random() * self.draw.random() * seconds
        while time.monotonic() < end and any(process.is_alive() for process in processes):
            time.sleep(0.01)

    def hit(self, processes: Sequence[BaseProcess], *, alone: bool) -> None:
        """Kill one process of the commands, or all of them and what earlier ones have left."""
        living = [process.pid for process in processes if process.is_alive() and process.pid]
        if not living:
            return
        self.hits += 1
        if alone:
            kill([self.draw.choice([found for pid in living for found in (pid, *descendants(pid))])])
            return
        while found := {*living, *standing_in(self.folder)}:
            kill([*found])
            living = []
            time.sleep(0.01)


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
    base = read_yaml(tmp_path / "base.yaml", what="the config")
    write_yaml(tmp_path / "base.yaml", {**base, "checkpoint_every_n_steps": 1})
    rounds = Rounds(tmp_path.resolve(), kind, study, seed=kind)
    begun, wanted = 0, KILLS // len(KINDS)
    while rounds.hits < wanted:
        begun += 1
        commands, before = rounds.commands(f"round{begun}"), rounds.hits
        # Until it comes to its end by itself: moments are drawn over the whole length of what is left.
        while rounds.attempt(commands) and rounds.hits < wanted:
            pass
        found = rounds.whole(commands)
        others = {name: differences(held, rounds.expected) for name, held in found.items() if held != rounds.expected}
        assert not others, f"round {begun}, kills {before} to {rounds.hits}"
        print(f"{kind}: {rounds.hits} kills in {begun} rounds, equal bits", flush=True)
    print(f"{kind}: {rounds.took:.1f} s for one that is not killed")
