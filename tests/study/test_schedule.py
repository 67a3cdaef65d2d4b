"""The order in which a tree is run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from residency.runs.store.store import Store
from residency.study.executors.base import Executor, Outcome, Task
from residency.study.planning.tree import Need, Node, Tree
from residency.study.schedule import run_tree


class Small(Executor):
    """A machine that kills a large task whenever something runs beside it; small ones end after two looks."""

    slots = 2

    def __init__(self) -> None:
        self.running: dict[str, int] = {}
        self.killed = 0
        self.most = 0

    def submit(self, task: Task) -> None:
        self.running[task.id] = 0
        self.most = max(self.most, len(self.running))

    def wait(self, timeout: float) -> Sequence[Outcome]:
        for name in self.running:
            self.running[name] += 1
        if "large" in self.running and len(self.running) > 1:
            del self.running["large"]
            self.killed += 1
            return [Outcome(task_id="large", exit_code=-9)]
        ended = [name for name, looks in self.running.items() if looks >= 2]
        for name in ended:
            del self.running[name]
        return [Outcome(task_id=name, exit_code=0) for name in ended]

    def cancel(self, task_id: str) -> None:
        raise AssertionError("nothing is to be cancelled")

    def close(self) -> None:
        pass


def test_what_is_killed_again_and_again_gets_the_machine_to_itself(tmp_path: Path) -> None:
    parts = [node(name, folder=tmp_path, height=1) for name in ("large", "one", "two", "three", "four", "five")]
    executor = Small()
    (tmp_path / "store").mkdir()
    tree = Tree(nodes={part.task.id: part for part in parts})
    assert run_tree(tree, executor=executor, store=Store(tmp_path / "store")) == {}
    assert (executor.killed, executor.most) == (2, 2)


class OneByOne(Executor):
    """Carries nothing out; one task takes its time."""

    slots = 1

    def __init__(self, slow: str) -> None:
        self.slow = slow
        self.order: list[str] = []
        self._ended: list[Outcome] = []

    def submit(self, task: Task) -> None:
        self.order.append(task.id)
        time.sleep(0.05 * (task.id == self.slow))
        self._ended.append(Outcome(task_id=task.id, exit_code=0))

    def wait(self, timeout: float) -> Sequence[Outcome]:
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, task_id: str) -> None:
        raise AssertionError("nothing is to be cancelled")

    def close(self) -> None:
        pass


def node(name: str, *needs: str, folder: Path, height: int) -> Node:
    task = Task(id=name, spec={"status": str(folder / f"{name}.json")}, needs=needs)
    return Node(task=task, title=name, needs=[Need(node=n) for n in needs], cells=[name], height=height)


def test_what_follows_a_long_stage_is_not_left_to_the_end(tmp_path: Path) -> None:
    """At equal height; what more stages wait for still goes first."""
    parts = [
        node("quick", folder=tmp_path, height=1),
        node("slow", folder=tmp_path, height=1),
        node("after quick", "quick", folder=tmp_path, height=0),
        node("after slow", "slow", folder=tmp_path, height=0),
    ]
    executor = OneByOne("slow")
    tree = Tree(nodes={part.task.id: part for part in parts})
    assert run_tree(tree, executor=executor, store=Store(tmp_path / "store")) == {}
    assert executor.order == ["quick", "slow", "after slow", "after quick"]
