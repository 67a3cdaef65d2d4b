"""Kills, damage, a full disk, two sweeps at once: the same command finishes, with the results of an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from residency.runs.store.store import Store
from residency.study.executors import Outcome, Task
from residency.study.executors.local import LocalExecutor
from residency.study.views.events import Event, Watcher
from support.killed_sweep import in_child
from support.tiny_sweeps import EWC, Inline, matrices, run_sweep, write_study

AXES: dict[str, Any] = {"mitigation": {"none": {}, "ewc": EWC(1000.0)}}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(study file, folder of the undisturbed study)."""
    folder = tmp_path_factory.mktemp("faults")
    path = write_study(folder, llama, domains="ab", steps=4, axes=AXES)
    code, out = run_sweep(path, folder / "whole")
    assert code == 0, out
    return path, folder / "whole"


@pytest.fixture(scope="module")
def large(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """As `whole`, with so many stages that no run ends before it is stopped."""
    folder = tmp_path_factory.mktemp("large")
    values = {"none": {}, "ewc": EWC(1000.0), "strong": EWC(1e5), "online": EWC(1000.0, "online")}
    path = write_study(folder, llama, steps=6, axes={"mitigation": values}, seeds=[0, 1])
    code, out = run_sweep(path, folder / "whole")
    assert code == 0, out
    return path, folder / "whole"


# -- the program is killed --------------------------------------------------------------------------------------


def kill_again_and_again(whole: tuple[Path, Path], into: Path, kills: int) -> None:
    path, reference = whole
    draw, deaths = random.Random(7), 0
    for _ in range(kills):
        process = in_child(path, into, at=draw.randint(3, 30))
        process.join(timeout=240)
        deaths += process.exitcode == -signal.SIGKILL
    assert deaths >= min(kills, 3), "the sweep was to be killed"
    last = in_child(path, into)
    last.join(timeout=240)
    assert last.exitcode == 0
    assert matrices(into) == matrices(reference)
    names = {key for key, _ in Store(into / "store").entries("trained")}
    assert names == {key for key, _ in Store(reference / "store").entries("trained")}


def test_a_program_that_is_killed(whole: tuple[Path, Path], tmp_path: Path) -> None:
    kill_again_and_again(whole, tmp_path / "killed", kills=3)


def test_a_program_that_is_killed_twenty_times(large: tuple[Path, Path], tmp_path: Path) -> None:
    kill_again_and_again(large, tmp_path / "killed", kills=20)


# -- workers are killed -----------------------------------------------------------------------------------------


class Murderous(LocalExecutor):
    """Kills workers, and once the server of them all."""

    def __init__(self, *, kills: Sequence[str], **options: Any) -> None:
        self.kills = list(kills)
        super().__init__(**options)

    def wait(self, timeout: float) -> Sequence[Outcome]:
        """Kill whoever runs, after a while."""
        found = super().wait(timeout)
        if self.kills and self.pids:
            time.sleep(0.3)
            # A worker that has ended by itself meanwhile is no one to kill: the next one is.
            with contextlib.suppress(ProcessLookupError):
                if self.kills[-1] == "server":
                    assert self._server is not None
                    os.kill(self._server.pid, signal.SIGKILL)
                else:
                    os.kill(next(iter(self.pids.values())), signal.SIGKILL)
                self.kills.pop()
        return found


class Kept(Watcher):
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        """Keep it."""
        self.events.append(event)


def real_workers(kills: Sequence[str]) -> Callable[[Path], LocalExecutor]:
    return lambda logs: Murderous(kills=kills, workers=2, threads=1, logs=logs)


def test_workers_that_are_killed(whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    path, reference = whole
    kept = Kept()
    code, out = run_sweep(path, tmp_path / "out", real_workers(["worker", "server"]), watchers=[kept])
    assert code == 0, out
    retried = [event for event in kept.events if event.kind == "retried"]
    assert len(retried) >= 2
    assert all(event.message == "killed by signal 9" for event in retried)
    assert matrices(tmp_path / "out") == matrices(reference)
    scored = [event.means for event in kept.events if event.kind == "scores"]
    assert all({*means["nll"]} == {"a", "b"} for means in scored)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_with_workers_that_is_stopped(
    number: signal.Signals, large: tuple[Path, Path], tmp_path: Path
) -> None:
    path, reference = large
    words = [sys.executable, "-m", "residency", "sweep", str(path), "--study_dir", str(tmp_path / "out")]
    words += ["--workers=2", "--threads=1"]
    environment = {**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["RESIDENCY_TEST_STUDY"] = str(tmp_path / "out")  # by which its workers are known
    for last in (False, False, True):
        with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as one:
            if not last:
                wait_for_store(tmp_path / "out" / "store", one)
                one.send_signal(number)
            _, told = one.communicate(timeout=240)
        # Killed it cannot say anything; asked to stop it says how to go on.
        assert one.returncode == (0 if last else {signal.SIGKILL: -9, signal.SIGTERM: 75}[number]), told
        assert ("the same command goes on" in told) == (one.returncode == 75)
    wait_until_gone(str(tmp_path / "out"))
    assert matrices(tmp_path / "out") == matrices(reference)


def wait_for_store(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until one more entry is there, or the process has ended."""
    before = len(list(folder.glob("*/*")))
    while process.poll() is None and len(list(folder.glob("*/*"))) <= before:
        time.sleep(0.05)


def wait_until_gone(mark: str) -> None:
    """No process of the study is left."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if not any(mark.encode() in environment for environment in environments()):
            return
        time.sleep(0.2)
    raise AssertionError(f"a process still works on {mark}")


def environments() -> Iterator[bytes]:
    """Of all processes but this one; one may be gone, or not ours to look at."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            yield path.read_bytes()


# -- the store is damaged, shared, or full ----------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes({"truncated": data[: len(data) // 3], "flipped": data, "emptied": b""}[how])


def test_a_damaged_store_is_mended(whole: tuple[Path, Path], tmp_path: Path) -> None:
    path, reference = whole
    shutil.copytree(reference / "store", tmp_path / "store")
    damaged = 0
    for kind, file in (("trained", "state"), ("finished", "state"), ("evaluations", "scores")):
        places = sorted((tmp_path / "store" / kind).iterdir())
        for place, how in zip(places, ("truncated", "flipped", "emptied"), strict=False):
            damage(next(place.glob(f"{file}.*")), how)
            damaged += 1
    assert damaged == 3 + 1 + 3, "three stages, what EWC remembers of one, three of the scored columns"
    code, out = run_sweep(path, tmp_path / "out", store=tmp_path / "store")
    assert code == 0, out
    assert matrices(tmp_path / "out") == matrices(reference)
    assert len(list((tmp_path / "store" / "aside").iterdir())) == damaged


def test_two_sweeps_on_one_store(whole: tuple[Path, Path], tmp_path: Path) -> None:
    path, reference = whole
    shared = {"store": tmp_path / "store"}
    # A lease whose owner died before it could give it back must not stop them.
    dead = in_child(path, tmp_path / "dead", at=9, **shared)
    dead.join(timeout=240)
    assert dead.exitcode == -signal.SIGKILL
    both = [in_child(path, tmp_path / name, **shared) for name in ("one", "two")]
    for process in both:
        process.join(timeout=240)
    assert [process.exitcode for process in both] == [0, 0]
    assert matrices(tmp_path / "one") == matrices(tmp_path / "two") == matrices(reference)
    assert not list((tmp_path / "store" / "leases").iterdir())
    assert not (tmp_path / "store" / "aside").exists()


def test_one_study_has_one_sweep(whole: tuple[Path, Path]) -> None:
    from filelock import FileLock

    from residency.core.errors import UserError

    path, reference = whole
    with FileLock(reference / ".lock"), pytest.raises(UserError, match="in use by another sweep"):
        run_sweep(path, reference)


def test_a_full_disk(whole: tuple[Path, Path], tmp_path: Path) -> None:
    path, reference = whole
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    try:
        code, out = run_sweep(path, disk / "out")
        assert code in (2, 3)
        assert "no room on the disk" in out
        assert "free some space and run the same command again" in out
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        code, out = run_sweep(path, disk / "out")
        assert code == 0, out
        assert matrices(disk / "out") == matrices(reference)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # loaded tensors are mapped files


class OutOfMemory(Inline):
    """The first try of every stage runs out of memory, or crashes."""

    def __init__(self, logs: Path) -> None:
        super().__init__(logs)
        self.tried: set[str] = set()

    def submit(self, task: Task) -> None:
        """Fail once."""
        if task.id in self.tried or task.id.startswith("cell-"):
            super().submit(task)
            return
        self.tried.add(task.id)
        self.outcomes.append(Outcome(task_id=task.id, exit_code=1 if task.id.startswith("0-") else 71, message="full"))


def test_what_may_succeed_is_tried_again(whole: tuple[Path, Path], tmp_path: Path) -> None:
    path, reference = whole
    kept = Kept()
    code, out = run_sweep(path, tmp_path / "out", OutOfMemory, store=reference / "store", watchers=[kept])
    assert code == 0, out
    code, out = run_sweep(path, tmp_path / "fresh", OutOfMemory, watchers=[kept])
    assert code == 0, out
    assert {event.message for event in kept.events if event.kind == "retried"} == {"full"}
    assert matrices(tmp_path / "fresh") == matrices(reference)
