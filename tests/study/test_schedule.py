"""The order in which a tree is run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from residency.store import Store
from residency.study.executors.base import Executor, Outcome, Task
from residency.study.schedule import run_tree
from residency.study.tree import Need, Node, Tree


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
