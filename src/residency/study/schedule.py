"""Runs a tree on an executor: what is ready and matters most first, failures tried again where that makes sense."""

from __future__ import annotations

import shutil
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from residency.core.errors import EXIT_SIGNAL, EXIT_USER
from residency.core.signals import Stopped
from residency.runs.store.store import Store
from residency.study.executors.base import Executor, Outcome
from residency.study.planning.tree import Need, Tree
from residency.study.views.events import Event, Kind, Watcher
from residency.study.worker import EXIT_MEMORY, read_status

__all__ = ["Failure", "run_tree"]

_LITTLE = 2**20  # bytes; less than this is a full disk
_POLL = 0.5  # seconds between two looks at what running tasks tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a cell has no result.

    Args:
        code: Exit code of the task that failed, 2 if the user can mend it.
        message: What it told.
        title: Which task it was.
    """

    code: int
    message: str
    title: str


def run_tree(
    tree: Tree,
    *,
    executor: Executor,
    store: Store,
    watchers: Sequence[Watcher] = (),
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Failure]:
    """Run all tasks of a tree.

    A task that runs out of memory is tried once more with nothing beside it; one that crashed, once more; one whose
    worker was lost, twice more. What the user can mend, a loss that is not finite among it, is not tried again: it
    would end the same way. Whatever does not need a failed task goes on.

    Args:
        tree: The tasks.
        executor: Runs them.
        store: Tells what is there before its task has ended.
        watchers: What shows the study.
        seconds: Task id -> how long it will take, for the time left.

    Returns:
        {cell id: why it failed}; empty if all is done.

    Raises:
        Stopped: A task was stopped by a signal from outside.
    """
    return _Run(tree, executor, store, watchers, dict(seconds or {})).execute()


@dataclass
class _State:
    """What is known about the tasks."""

    waiting: set[str]
    running: dict[str, float] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    failed: dict[str, Failure] = field(default_factory=dict)
    tries: Counter[str] = field(default_factory=Counter)
    alone: set[str] = field(default_factory=set)


class _Run:
    def __init__(
        self,
        tree: Tree,
        executor: Executor,
        store: Store,
        watchers: Sequence[Watcher],
        seconds: dict[str, float],
    ) -> None:
        self.nodes = tree.nodes
        self.executor = executor
        self.store = store
        self.watchers = watchers
        self.seconds = seconds
        self.state = _State(waiting={*tree.nodes})
        self._told: dict[str, Any] = {}

    def execute(self) -> dict[str, Failure]:
        while self.state.waiting or self.state.running:
            self._submit()
            for outcome in self.executor.wait(_POLL):
                self._ended(outcome)
            self._look()
            for watcher in self.watchers:
                watcher.tick()
        cells: dict[str, Failure] = {}
        for task, failure in self.state.failed.items():
            for cell in self.nodes[task].cells:
                cells.setdefault(cell, failure)
        return cells

    # -- starting -----------------------------------------------------------------------------------------------

    def _submit(self) -> None:
        ready = [task for task in self.state.waiting if all(self._is_there(n) for n in self.nodes[task].needs)]
        order, taken = {task: place for place, task in enumerate(self.nodes)}, self._taken()
        for task in sorted(ready, key=lambda t: (-self.nodes[t].height, -self._before(t, taken), order[t])):
            full = len(self.state.running) >= self.executor.slots
            blocked = self.state.running.keys() & self.state.alone or (task in self.state.alone and self.state.running)
            if full or blocked:
                return
            self.state.waiting.discard(task)
            self.state.running[task] = time.monotonic()
            self._status(task).unlink(missing_ok=True)
            self.executor.submit(self.nodes[task].task)
            self._tell("running", task)

    def _taken(self) -> dict[str, float]:
        """Seconds of the tasks that are done, and of those that run as far as they are."""
        now = time.monotonic()
        return self.seconds | {task: now - since for task, since in self.state.running.items()}

    def _before(self, task: str, taken: Mapping[str, float]) -> float:
        """Seconds of the slowest task right before: what follows a long stage is long, and is not left to the end."""
        return max((taken.get(need.node, 0.0) for need in self.nodes[task].needs), default=0.0)

    def _is_there(self, need: Need) -> bool:
        if need.node in self.state.done:
            return True
        return need.kind is not None and self.store.has(need.kind, need.key)

    # -- ending -------------------------------------------------------------------------------------------------

    def _ended(self, outcome: Outcome) -> None:
        task = outcome.task_id
        if task not in self.state.running:
            return
        taken = time.monotonic() - self.state.running.pop(task)
        if outcome.exit_code == 0:
            self.seconds[task] = taken
            self.state.done.add(task)
            if means := read_status(self._status(task)).get("means"):
                self._tell("scores", task, means=means)
            self._tell("done", task, left=self._left())
            return
        if outcome.exit_code == EXIT_SIGNAL:
            raise Stopped("a signal to one of its tasks")
        message = str(read_status(self._status(task)).get("message") or outcome.message or self._guess(task))
        self.state.tries[task] += 1
        if self._again(task, outcome.exit_code):
            self.state.waiting.add(task)
            self._tell("retried", task, message=message)
            return
        node = self.nodes[task]
        self._fail(task, Failure(code=outcome.exit_code, message=message, title=node.title))

    def _guess(self, task: str) -> str:
        """What a task could not tell: on a full disk there is no room for its last words either."""
        if shutil.disk_usage(self.store.path).free < _LITTLE:
            return (
                f"no room on the disk for {self.store.path}\n"
                "  fix: free some space and run the same command again: it goes on from the last complete state"
            )
        return f"it ended without a word; see logs/{task}.log in the folder of the study"

    def _again(self, task: str, code: int) -> bool:
        # A kernel that is out of memory kills without a word: the last try has the machine to itself.
        if code == EXIT_MEMORY or (code == -signal.SIGKILL and self.state.tries[task] > 1):
            self.state.alone.add(task)
        again = 0 if code == EXIT_USER else 2 if code < 0 else 1
        return self.state.tries[task] <= again

    def _fail(self, task: str, failure: Failure) -> None:
        self.state.failed[task] = failure
        self._tell("failed", task, message=failure.message)
        for other, node in self.nodes.items():
            depends = any(need.node == task and not self._is_there(need) for need in node.needs)
            if other in self.state.waiting and depends:
                self.state.waiting.discard(other)
                self._skip(other, failure)

    def _skip(self, task: str, failure: Failure) -> None:
        self.state.failed[task] = failure
        self._tell("skipped", task, message=failure.message)
        for other, node in self.nodes.items():
            if other in self.state.waiting and any(need.node == task for need in node.needs):
                self.state.waiting.discard(other)
                self._skip(other, failure)

    # -- telling ------------------------------------------------------------------------------------------------

    def _status(self, task: str) -> Path:
        return Path(self.nodes[task].task.spec["status"])

    def _look(self) -> None:
        """Progress of the running tasks, through their status files: they may run on other machines."""
        for task in self.state.running:
            told = read_status(self._status(task))
            if told and told != self._told.get(task):
                self._told[task] = told
                shown = {key: told.get(key, default) for key, default in (("step", 0), ("steps", 0), ("phase", ""))}
                self._tell("progress", task, **shown)

    def _left(self) -> float | None:
        """Seconds until the end, from what similar tasks took; `None` as long as nothing is known."""
        known = [s for t, s in self.seconds.items() if self._kind(t) == "stage"]
        if not known:
            return None
        usual = sum(known) / len(known)
        open_tasks = [*self.state.waiting, *self.state.running]
        work = sum(self.seconds.get(t, usual if self._kind(t) == "stage" else usual / 4) for t in open_tasks)
        now = time.monotonic()
        spent = sum(min(now - since, self.seconds.get(t, usual)) for t, since in self.state.running.items())
        longest = max((self.nodes[t].height for t in open_tasks), default=0) * usual / 2
        return max((work - spent) / max(1, self.executor.slots), min(longest, work))

    @staticmethod
    def _kind(task: str) -> str:
        return "record" if task.startswith("cell-") else "base" if task.startswith("0-") else "stage"

    def _tell(self, kind: Kind, task: str, **what: Any) -> None:
        event = Event(kind=kind, task=task, **what)
        for watcher in self.watchers:
            watcher.event(event)
