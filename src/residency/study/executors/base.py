"""The contract of an executor: it runs tasks that are ready, in any process that shares the study's folder.

An executor knows nothing of studies. The scheduler (`residency.study.schedule`) decides what is ready, what is tried
again and what a failure means; whatever a task produces lies in the store, so an executor carries no results.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Executor", "Outcome", "Resources", "Task"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a task occupies while it runs.

    Args:
        cpus: Threads it computes with.
        gpus: Devices it trains on; 0 = it must not see any.
    """

    cpus: int = 1
    gpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One unit of work: a stage of the tree, row 0, or putting a cell's folder together.

    Args:
        id: Unique in the study; a safe file name.
        spec: What `residency.study.worker.run_task` is called with; plain JSON values only.
        needs: Ids of the tasks whose products it reads. The scheduler submits a task when they are there.
        resources: What it occupies.
    """

    id: str
    spec: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    resources: Resources = field(default_factory=Resources)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a task ended.

    Args:
        task_id: Which one.
        exit_code: As of a command: 0 done, 2 the user can mend it, 71 out of memory, 75 stopped by a signal, other
            positive codes: a crash. Negative: killed by that signal, or the worker was lost with its node (-9).
        message: For the user; empty if done.
    """

    task_id: str
    exit_code: int
    message: str = ""


class Executor(ABC):
    """Runs tasks somewhere. All methods are called from one thread.

    A task's process is clean: nothing of an earlier task is left in it. It runs `run_task(task.spec)` and ends with
    the code that this returns. Its standard output and error do not reach the terminal of the study.
    """

    @property
    @abstractmethod
    def slots(self) -> int:
        """Tasks that can run at once, at the moment; the scheduler keeps about that many submitted."""

    @abstractmethod
    def submit(self, task: Task) -> None:
        """Start a task, or queue it; returns at once."""

    @abstractmethod
    def wait(self, timeout: float) -> Sequence[Outcome]:
        """Tasks that ended since the last call; returns as soon as there is one, at the latest after `timeout`.

        Args:
            timeout: Seconds; 0 = only look.
        """

    @abstractmethod
    def cancel(self, task_id: str) -> None:
        """Ask a task to stop cleanly (as SIGTERM does). Its outcome still comes, with code 75 or a signal's."""

    @abstractmethod
    def close(self) -> None:
        """Stop everything that still runs and free what the executor holds. May be called twice."""
