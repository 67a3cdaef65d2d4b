"""An executor that runs every task at once and here: what it makes is the same, and nothing is forked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from residency.study.executors.base import Executor, Outcome, Task
from residency.study.tasks import run_task

__all__ = ["InlineExecutor"]


class InlineExecutor(Executor):
    """Runs tasks in this process.

    Args:
        before: Called with every task before it runs; may raise.
    """

    def __init__(self, before: Callable[[Task], None] = lambda task: None) -> None:
        self.before = before
        self.ran: list[Task] = []
        self._ended: list[Outcome] = []

    @property
    def slots(self) -> int:
        """One."""
        return 1

    def submit(self, task: Task) -> None:
        """Run it."""
        self.before(task)
        self.ran.append(task)
        self._ended.append(Outcome(task_id=task.id, exit_code=run_task(task.spec)))

    def wait(self, timeout: float) -> Sequence[Outcome]:
        """What was submitted."""
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, task_id: str) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """Nothing is held."""
