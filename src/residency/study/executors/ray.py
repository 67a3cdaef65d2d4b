"""Tasks on Ray Core: one machine, or every node of a cluster that sees the study's folder.

Without RAY_ADDRESS a private instance is started on this machine and ends with the study; with it, the study joins that
cluster. Ray places tasks and notices lost nodes; nothing of Ray Tune or Train is used, and Ray retries nothing: what a
failure means is decided in one place, by the scheduler.

On Slurm see `experiments/slurm/ray.sbatch`.
"""

from __future__ import annotations

import functools
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from residency.core.errors import EXIT_SIGNAL, UserError
from residency.study.executors.base import Executor, Outcome, Task
from residency.study.executors.forkserver import CALL
from residency.study.executors.ray_node import carry_out

__all__ = ["RayExecutor"]

_OUT_OF_MEMORY = 71
_LOST = -9


class RayExecutor(Executor):
    """Runs tasks as Ray tasks; every Ray worker runs them by a local executor of its own, one at a time.

    Args:
        threads: CPUs of a task, and threads that it computes with.
        logs: Folder for what tasks print, on a file system that all nodes share.
        address: Of a running cluster; RAY_ADDRESS by default; without either, a private instance on this machine.
        cpus: CPUs of the private instance; all by default.
        call: What carries a task out; another one only in tests.

    Raises:
        UserError: Ray is missing, the cluster cannot be reached, or none of its nodes could ever run such a task.
    """

    def __init__(
        self,
        *,
        threads: int,
        logs: Path,
        address: str | None = None,
        cpus: int | None = None,
        call: str = CALL,
    ) -> None:
        self.threads = threads
        self.logs = logs
        self.gpus = 0  # of the tasks so far that need most
        self.call = call
        self._refs: dict[Any, str] = {}
        self._cancelled: set[str] = set()
        self._environment: dict[str, str | None] = {}
        self._ray = _import_ray()
        self._connect(address or os.environ.get("RAY_ADDRESS") or None, cpus)
        self._remote = self._ray.remote(carry_out)
        logs.mkdir(parents=True, exist_ok=True)
        self._check_room()

    def _check_room(self) -> None:
        if not self._capacity():
            self.close()
            raise UserError(
                f"no node of the Ray cluster has {self.threads} CPUs and {self.gpus} GPUs",
                why="a task runs on one node, and this one would wait for ever",
                fix="start the nodes with these resources, or let a stage use fewer (--threads, trainer.devices)",
            )

    def _connect(self, address: str | None, cpus: int | None) -> None:
        settings = {"RAY_USAGE_STATS_ENABLED": "0"}
        if address is None and not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & {*os.environ}:
            # Ray would write the token of a private instance into the home folder, which may be shared or read-only.
            settings["RAY_AUTH_TOKEN"] = _token()
        self._environment = {name: os.environ.get(name) for name in (*settings, "RAY_AUTH_MODE")}
        os.environ.update(settings)
        private = {"include_dashboard": False, "num_cpus": cpus} if address is None else {}
        try:
            self._ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **private)
        except (OSError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
            self._restore()
            raise UserError(
                f"Ray at {address or 'this machine'}: {' '.join(str(error).split())[:300]}",
                why="the study's tasks were to run there",
                fix="check RAY_ADDRESS and `ray status` there; all nodes need the same Ray, Python and token "
                "(RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, or a shared home folder)",
            ) from error

    def _restore(self) -> None:
        for name, value in self._environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        self._environment = {}

    # -- the contract of an executor ------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Tasks that fit on the nodes that are alive; 1 while there are none, so that the study waits for one."""
        return max(1, self._capacity())

    def _capacity(self) -> int:
        wanted = {"CPU": self.threads, "GPU": self.gpus}
        alive = [node.get("Resources", {}) for node in self._ray.nodes() if node["Alive"]]
        return sum(min(int(node.get(name, 0) // count) for name, count in wanted.items() if count) for node in alive)

    def submit(self, task: Task) -> None:
        """Hand a task to Ray, which queues it until a node has room."""
        options = {
            "name": f"residency {task.id}",
            "num_cpus": self.threads,
            "num_gpus": task.resources.gpus,
            "max_retries": 0,
            "scheduling_strategy": "SPREAD",
        }
        if task.resources.gpus > self.gpus:
            self.gpus = task.resources.gpus
            self._check_room()
        ref = self._remote.options(**options).remote(task, self.threads, self.logs, version("residency"), self.call)
        self._refs[ref] = task.id

    def wait(self, timeout: float) -> Sequence[Outcome]:
        """Tasks that ended since the last call."""
        if not self._refs:
            time.sleep(timeout)
            return []
        some, _ = self._ray.wait(list(self._refs), num_returns=1, timeout=timeout)
        if some:
            some, _ = self._ray.wait(list(self._refs), num_returns=len(self._refs), timeout=0)
        return [self._outcome(ref) for ref in some]

    def _outcome(self, ref: Any) -> Outcome:
        task = self._refs.pop(ref)
        errors = self._ray.exceptions
        cancelled = task in self._cancelled
        self._cancelled.discard(task)
        try:
            code, message = self._ray.get(ref)
            return Outcome(task_id=task, exit_code=code, message=message)
        except errors.TaskCancelledError:
            return Outcome(task_id=task, exit_code=EXIT_SIGNAL, message="stopped")
        except errors.OutOfMemoryError as error:
            return Outcome(task_id=task, exit_code=_OUT_OF_MEMORY, message=_first_line(error))
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.LocalRayletDiedError, errors.ObjectLostError):
            code = EXIT_SIGNAL if cancelled else _LOST
            return Outcome(task_id=task, exit_code=code, message="its worker or its node was lost")
        except errors.RayError as error:
            return Outcome(task_id=task, exit_code=1, message=_first_line(error))

    def cancel(self, task_id: str) -> None:
        """Ask a task to stop cleanly; one that has not started yet never will."""
        self._cancelled.add(task_id)
        for ref, task in self._refs.items():
            if task == task_id:
                # A KeyboardInterrupt in the worker, which asks the task's process to stop and reports how it ended.
                self._ray.cancel(ref, force=False)

    def close(self) -> None:
        """Stop what runs, leave the cluster; a private instance ends."""
        if not self._environment:
            return
        for task in list(self._refs.values()):
            self.cancel(task)
        with suppress(Exception):
            self._ray.wait(list(self._refs), num_returns=len(self._refs), timeout=10.0)
        self._refs.clear()
        self._ray.shutdown()
        self._restore()


@functools.cache
def _token() -> str:
    """Ray reads a token once per process, so there is one."""
    return secrets.token_hex(32)


def _import_ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "the executor ray was asked for, and Ray is not installed",
            why="it is an extra, because one machine does not need it",
            fix="install it with `pip install 'residency[ray]'` on every node, or use --executor local",
        ) from error
    return ray


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
