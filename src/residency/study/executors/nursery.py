"""Clean processes without the price of imports: a server that has imported everything forks one process per task.

The server is a child of whoever runs tasks (a Ray worker, a plain process). It ends with its owner, however that dies:
its standard input closes then, and it takes the running task with it. Nothing else would stop a stage whose owner has
been killed, and two owners would train the same stage side by side.

Protocol, one task at a time. In: {"spec", "environment", "log", "devices"}; out: {"ready"} once, then {"pid"} and
{"code"} for every task; each on a line of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["CALL", "GRACE_SECONDS", "PRELOAD", "Nursery", "main"]

GRACE_SECONDS = 20.0
"""How long a task that is asked to stop may take, before it is killed."""

_POLL_SECONDS = 0.05
# Importing runs nothing in parallel and touches no device, so that forking afterwards is safe.
CALL = "residency.study.tasks.run_task"
PRELOAD = (
    "residency.cli",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
)


class Nursery:
    """Owner's side of the server; started with the first task, kept for the next one.

    Args:
        call: Full name of what carries a task out: a function of the spec that returns an exit code. Its module, run
            with the path of a spec, does the same.
        preload: Modules that the server imports before the first task.
    """

    def __init__(self, *, call: str = CALL, preload: tuple[str, ...] = PRELOAD) -> None:
        self.call = call
        self.preload = preload
        self._server: subprocess.Popen[str] | None = None

    def run(
        self,
        spec: Mapping[str, Any],
        *,
        environment: Mapping[str, str | None],
        log: Path,
        devices: int = 0,
        stopping: Callable[[], bool] = lambda: False,
        grace: float = GRACE_SECONDS,
    ) -> int:
        """Carry a task out in a process of its own, and wait for it.

        Args:
            spec: What `run_task` is called with.
            environment: Variables that the process gets besides those of its owner; `None` = removed.
            log: Where its standard output and error go.
            devices: Devices it trains on; from 2 on it gets a command line of its own, which DDP starts again.
            stopping: Asked now and then: whether the task shall stop. `KeyboardInterrupt` stops it too.
            grace: Seconds between asking it to stop and killing it.

        Returns:
            Its exit code; negative = killed by that signal.
        """
        server = self._started()
        request = {"spec": spec, "environment": environment, "log": str(log), "devices": devices}
        self._write(server, request)
        pid = int(self._read(server)["pid"])
        deadline: float | None = None
        while True:
            try:
                while not _readable(server):
                    if deadline is None and stopping():
                        deadline = _ask_to_stop(pid, grace)
                    if deadline is not None and time.monotonic() > deadline:
                        _signal_group(pid, signal.SIGKILL)
                return int(self._read(server)["code"])
            except KeyboardInterrupt:
                deadline = deadline or _ask_to_stop(pid, grace)

    def close(self) -> None:
        """End the server, and a task that runs. May be called twice."""
        server, self._server = self._server, None
        if server is not None:
            assert server.stdin is not None
            with suppress(OSError):
                server.stdin.close()
            try:
                server.wait(timeout=5)
            except subprocess.TimeoutExpired:
                _signal_group(server.pid, signal.SIGKILL)
                server.wait()
            assert server.stdout is not None
            server.stdout.close()

    def _started(self) -> subprocess.Popen[str]:
        if self._server is not None and self._server.poll() is not None:
            self.close()
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "residency.study.executors.nursery", self.call, *self.preload],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
                # A Ctrl-C at the terminal reaches the study alone; it decides what stops.
                start_new_session=True,
                # A library that looks for devices while it is imported must not initialise CUDA before the fork.
                env={**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            )
            self._read(self._server)
        return self._server

    @staticmethod
    def _write(server: subprocess.Popen[str], request: Mapping[str, Any]) -> None:
        assert server.stdin is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()

    @staticmethod
    def _read(server: subprocess.Popen[str]) -> dict[str, Any]:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of clean processes ended with code {server.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _readable(server: subprocess.Popen[str]) -> bool:
    assert server.stdout is not None
    return bool(select.select([server.stdout], [], [], 4 * _POLL_SECONDS)[0])


def _ask_to_stop(pid: int, grace: float) -> float:
    """When it will be killed."""
    # The task alone: it stops its own children cleanly, and a signal to all would stop them under its feet.
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    return time.monotonic() + grace


def _signal_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


# -- the server -----------------------------------------------------------------------------------------------------


def main(call: str, *preload: str) -> None:
    """Serve until the owner is gone.

    Args:
        call: As in `Nursery`.
        preload: As in `Nursery`.
    """
    module, _, name = call.rpartition(".")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # What imports or tasks print must not be taken for an answer.
    os.dup2(2, 1)
    for each in (*preload, module):
        importlib.import_module(each)
    print(json.dumps({"ready": True}), file=answers)
    while request := _next_request():
        pid = os.fork()
        if pid == 0:
            answers.close()
            _task(module, name, request)
        with suppress(OSError):  # the child does the same; whoever is first
            os.setpgid(pid, pid)
        print(json.dumps({"pid": pid}), file=answers)
        print(json.dumps({"code": _wait(pid)}), file=answers)


def _next_request() -> dict[str, Any] | None:
    # Byte by byte: what a buffer holds would be missed by `select`.
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return None
        line += byte
    request: dict[str, Any] = json.loads(line)
    return request


def _wait(pid: int) -> int:
    """The exit code of a task; if the owner goes away, the task is killed and the server ends."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            # What the task has left running (loader processes, other ranks) goes with it.
            _signal_group(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(status)
        # Nothing is asked for while a task runs: readable means closed.
        if select.select([0], [], [], _POLL_SECONDS)[0]:
            _signal_group(pid, signal.SIGKILL)
            os._exit(0)


def _task(module: str, name: str, request: Mapping[str, Any]) -> NoReturn:
    """In the forked process: become clean, run the task, end."""
    code = 1
    try:
        with suppress(OSError):
            os.setpgid(0, 0)
        _redirect(Path(request["log"]))
        for variable, value in request["environment"].items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value
        if request["devices"] > 1:
            _replace(module, request["spec"])
        code = _run(getattr(importlib.import_module(module), name), request["spec"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _redirect(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, number in ((nothing, 0), (target, 1), (target, 2)):
        os.dup2(source, number)


def _run(call: Callable[[Mapping[str, Any]], int], spec: Mapping[str, Any]) -> int:
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and "torch" in sys.modules:
        # It has read the environment when it was imported, which was before this task had its own.
        sys.modules["torch"].set_num_threads(int(threads))
    return call(spec)


def _replace(module: str, spec: Mapping[str, Any]) -> NoReturn:
    """Become a process with a command line of its own."""
    handle, path = tempfile.mkstemp(suffix=".json", prefix="residency-task-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(dict(spec), file)
    os.execv(sys.executable, [sys.executable, "-m", module, path])


if __name__ == "__main__":
    main(*sys.argv[1:])
