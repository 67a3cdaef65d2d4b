"""Ray carries tasks out as the contract of an executor says, on a real cluster of two nodes on this machine.

What stops, loses and refuses tasks there runs with `make test-slow`, beside a study that loses a node.
"""

from __future__ import annotations

import builtins
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from residency.core.errors import UserError
from residency.study.executors.base import Outcome, Resources, Task
from residency.study.executors.ray import RayExecutor
from support.executor_tasks import gone, note


@pytest.fixture
def executor(cluster: Any, tmp_path: Path) -> Iterator[RayExecutor]:
    """Connected to the cluster, whose second node is there."""
    if not cluster.worker_nodes:
        cluster.add_node(num_cpus=1, include_dashboard=False)
    call = "support.executor_tasks.run_task"
    found = RayExecutor(threads=1, logs=tmp_path / "logs", address=cluster.address, call=call)
    yield found
    found.close()


def task(folder: Path, name: str, **spec: Any) -> Task:
    """A task that leaves a note under its name."""
    spec = {"note": str(folder / name), "status": str(folder / f"{name}.json"), "name": name, **spec}
    return Task(id=name, spec=spec)


def all_of(executor: RayExecutor, count: int) -> dict[str, Outcome]:
    """The next outcomes."""
    found: list[Outcome] = []
    deadline = time.monotonic() + 60
    while len(found) < count and time.monotonic() < deadline:
        found += executor.wait(1.0)
    return {outcome.task_id: outcome for outcome in found}


def codes(outcomes: dict[str, Outcome]) -> dict[str, int]:
    """Exit codes by task."""
    return {name: outcome.exit_code for name, outcome in outcomes.items()}


def test_tasks_run_side_by_side_and_end_with_their_codes(executor: RayExecutor, tmp_path: Path) -> None:
    assert executor.slots == 2
    assert executor.wait(0.0) == []
    wanted = {"fine": 0, "user": 2, "memory": 71, "stopped": 75, "bug": 1, "killed": -9}
    for name, code in wanted.items():
        extra = {"signal": int(signal.SIGKILL)} if name == "killed" else {"code": code}
        executor.submit(task(tmp_path, name, **extra))
    assert codes(all_of(executor, len(wanted))) == wanted
    seen = note(tmp_path / "fine")["environment"]
    assert seen["CUDA_VISIBLE_DEVICES"] == "", "a task without devices sees none"
    assert seen["OMP_NUM_THREADS"] == "1"
    assert "SLURM_NTASKS" not in seen, "Lightning would wait for three others"
    assert (tmp_path / "logs" / "fine.log").read_text() == "printed by fine\n"
    assert executor.wait(0.0) == []


@pytest.mark.slow
def test_a_task_that_is_cancelled_stops_cleanly_and_one_that_waits_never_starts(
    executor: RayExecutor, tmp_path: Path
) -> None:
    for name in ("one", "two", "waiting"):
        executor.submit(task(tmp_path, name, seconds=60, on_stop="finish"))
    running = [note(tmp_path / name) for name in ("one", "two")]
    for name in ("waiting", "one", "two"):
        executor.cancel(name)
    assert codes(all_of(executor, 3)) == {"one": 75, "two": 75, "waiting": 75}
    assert all(gone(each["pid"]) for each in running)
    assert not (tmp_path / "waiting").exists()


@pytest.mark.slow
def test_a_node_is_lost_with_its_task_and_the_other_goes_on(
    cluster: Any, executor: RayExecutor, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        executor.submit(task(tmp_path, name, seconds=60, on_stop="finish"))
    pids = {name: note(tmp_path / name)["pid"] for name in ("one", "two")}
    cluster.remove_node(next(iter(cluster.worker_nodes)))
    outcomes = all_of(executor, 1)
    assert [*codes(outcomes).values()] == [-9]
    (lost,) = outcomes
    assert "lost" in outcomes[lost].message
    assert gone(pids[lost]), "the lost task does not train on beside the one that replaces it"
    assert executor.slots == 1
    (left,) = {"one", "two"} - {lost}
    executor.cancel(left)
    executor.submit(task(tmp_path, "again"))
    assert codes(all_of(executor, 2)) == {left: 75, "again": 0}


@pytest.mark.slow
def test_closing_stops_what_runs(executor: RayExecutor, tmp_path: Path) -> None:
    executor.submit(task(tmp_path, "one", seconds=60, on_stop="finish"))
    found = note(tmp_path / "one")
    executor.close()
    assert gone(found["pid"])
    executor.close()


@pytest.mark.slow
def test_a_folder_that_the_node_does_not_see(executor: RayExecutor, tmp_path: Path) -> None:
    (tmp_path / "logs").rmdir()
    executor.submit(task(tmp_path, "far"))
    outcome = all_of(executor, 1)["far"]
    assert outcome.exit_code == 2
    assert "file system that all nodes share" in outcome.message


def test_what_no_node_can_run_is_refused_at_once(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no node of the Ray cluster has 64 CPUs and 0 GPUs"):
        RayExecutor(threads=64, logs=tmp_path, address=cluster.address)
    executor = RayExecutor(threads=1, logs=tmp_path, address=cluster.address)
    with pytest.raises(UserError, match="no node of the Ray cluster has 1 CPUs and 8 GPUs"):
        executor.submit(Task(id="big", spec={}, resources=Resources(gpus=8)))
    assert os.environ["RAY_AUTH_TOKEN"] == "0123456789abcdef" * 4, "the environment is as it was"


def test_without_the_extra_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = builtins.__import__

    def without_ray(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(UserError, match=r"pip install 'residency\[ray\]'"):
        RayExecutor(threads=1, logs=tmp_path)
