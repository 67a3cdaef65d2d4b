"""Workers on this machine: clean processes, forked from a server that has imported everything once."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from residency.study.executors.base import Executor, Outcome, Task
from residency.study.executors.forkserver import CALL

__all__ = ["LocalExecutor"]


class LocalExecutor(Executor):
    """Runs tasks side by side.

    Args:
        workers: Tasks at once.
        threads: Threads of each.
        devices: Names of the GPUs to share out, as in CUDA_VISIBLE_DEVICES; empty = CPU only.
        logs: Folder for what tasks print.
        call: What carries a task out; another one only in tests.
    """

    def __init__(
        self, *, workers: int, threads: int, logs: Path, devices: Sequence[str] = (), call: str = CALL
    ) -> None:
        self.call = call
        self.workers = workers
        self.threads = threads
        self.logs = logs
        self._free = list(devices)
        self._held: dict[str, list[str]] = {}
        self._running: dict[str, Task] = {}
        self._waiting: list[Task] = []
        self._early: list[Outcome] = []
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._pids: dict[str, int] = {}
        self._server: subprocess.Popen[bytes] | None = None
        self._ready = threading.Event()
        self._start()

    @property
    def slots(self) -> int:
        """The number of workers."""
        return self.workers

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the running tasks."""
        return dict(self._pids)

    def submit(self, task: Task) -> None:
        """Start a task if a worker is free, else keep it."""
        self._waiting.append(task)
        self._fill()

    def wait(self, timeout: float) -> Sequence[Outcome]:
        """Tasks that ended."""
        found, self._early = self._early, []
        block = timeout > 0 and not found
        while True:
            try:
                answer = self._answers.get(block, timeout)
            except queue.Empty:
                break
            if answer is None:
                found += self._lost()
            elif "started" in answer:
                self._pids[answer["started"]] = answer["pid"]
                continue
            elif "ended" in answer and answer["ended"] in self._running:
                found.append(self._ended(answer["ended"], int(answer["code"])))
            block = False
        self._fill()
        return found

    def cancel(self, task_id: str) -> None:
        """SIGTERM to a task."""
        if task_id in self._running:
            self._tell({"stop": task_id})
        elif any(task.id == task_id for task in self._waiting):
            self._waiting = [task for task in self._waiting if task.id != task_id]
            self._early.append(Outcome(task_id=task_id, exit_code=75))

    def close(self) -> None:
        """Stop all tasks and the server; waits until they are gone."""
        server, self._server = self._server, None
        if server is None:
            return
        _close(server)
        if not self._ready.is_set():
            server.terminate()  # it still imports, and would see the end of its input only after that
        try:
            server.wait(timeout=40)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        self._listener.join(timeout=5)
        self._running.clear()
        self._pids.clear()

    # -- the server ---------------------------------------------------------------------------------------------

    def _start(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            # Plug-ins are found where this process finds them, and nowhere else (-P).
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        }
        self.logs.mkdir(parents=True, exist_ok=True)
        self._ready.clear()
        with (self.logs / "server.log").open("ab") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-m", "residency.study.executors.forkserver", self.call],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                # Ctrl-C is for the program, which stops its tasks in order.
                start_new_session=True,
            )
        self._listener = threading.Thread(target=self._listen, args=(self._server,), daemon=True)
        self._listener.start()

    def _listen(self, server: subprocess.Popen[bytes]) -> None:
        assert server.stdout is not None
        with server.stdout:
            for line in server.stdout:
                self._ready.set()
                self._answers.put(json.loads(line))
        if server is self._server:
            self._answers.put(None)

    def _tell(self, order: dict[str, Any]) -> None:
        if self._server is not None and self._server.stdin is not None:
            with suppress(BrokenPipeError):
                self._server.stdin.write(json.dumps(order).encode() + b"\n")
                self._server.stdin.flush()

    def _lost(self) -> list[Outcome]:
        """The server itself was killed, and its tasks with it."""
        lost = [self._ended(task, -9) for task in list(self._running)]
        if self._server is not None:
            self._server.wait()
            _close(self._server)
            self._start()
        return lost

    # -- tasks --------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self.workers:
            gpus = self._waiting[0].resources.gpus
            if gpus > len(self._free) and self._held and any(self._held.values()):
                return
            task = self._waiting.pop(0)
            devices, self._free = self._free[:gpus], self._free[gpus:]
            self._held[task.id] = devices
            self._running[task.id] = task
            argv = str(self._own_argv(task)) if gpus > 1 else ""
            environment = {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
            log = str(self.logs / f"{task.id}.log")
            spec = {"threads": self.threads, **task.spec}
            self._tell({"run": task.id, "spec": spec, "log": log, "environment": environment, "argv": argv})

    def _own_argv(self, task: Task) -> Path:
        path = self.logs / f"{task.id}.json"
        path.write_text(json.dumps(dict(task.spec)), encoding="utf-8")
        return path

    def _ended(self, task_id: str, code: int) -> Outcome:
        self._running.pop(task_id, None)
        self._pids.pop(task_id, None)
        self._free += self._held.pop(task_id, [])
        return Outcome(task_id=task_id, exit_code=code, message="" if code >= 0 else f"killed by signal {-code}")


def _close(server: subprocess.Popen[bytes]) -> None:
    """End of input: the server stops its tasks and ends."""
    with suppress(OSError):
        if server.stdin is not None:
            server.stdin.close()
