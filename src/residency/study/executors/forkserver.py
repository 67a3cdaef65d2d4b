"""A process that has imported everything once and forks a clean child for every task.

The program talks to it in JSON lines over its standard input and output:

    {"run": id, "spec": {...}, "log": path, "environment": {...}, "argv": bool}   start a task
    {"stop": id}                                                                  SIGTERM to it
    {"kill": id}                                                                  SIGKILL to it
    -> {"ready": true}, {"started": id, "pid": n}, {"ended": id, "code": n}       (negative: that signal)

End of input stops all children and ends the server: nothing outlives the program. Forking is safe because the server
only imports: it never computes, so no thread pool has been started whose locks a child could inherit.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from residency.study.executors.warm_up import warm_up

__all__ = ["CALL", "PRELOAD", "main"]

CALL = "residency.study.worker.run_task"
"""What carries a task out, for all but tests."""
PRELOAD = (
    "residency.study.worker",
    "residency.runs.cli",
    "residency.runs.stream",
    "residency.runs.views.trackers",
    "residency.runs.config.class_names",
    "peft",
    "torchmetrics.functional.text.rouge",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)
_PATIENCE = 20.0  # seconds between SIGTERM and SIGKILL


class _Server:
    def __init__(self, call: str) -> None:
        self.call = call
        self.cold = call == CALL
        self.children: dict[int, str] = {}
        self.buffer = b""
        # What a task prints must never be taken for an answer.
        self.answers = os.dup(1)
        os.dup2(2, 1)
        # A child that ends writes into this pipe, so that one `select` waits for both.
        self.wake, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def tell(self, answer: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):
            os.write(self.answers, json.dumps(answer).encode() + b"\n")

    def serve(self) -> None:
        self.tell({"ready": True})
        while True:
            readable = select.select([0, self.wake], [], [])[0]
            self.reap()
            if 0 in readable:
                data = os.read(0, 1 << 16)
                if not data:
                    return
                *lines, self.buffer = (self.buffer + data).split(b"\n")
                for line in lines:
                    self.obey(json.loads(line))

    def obey(self, order: dict[str, Any]) -> None:
        if "run" in order:
            if self.cold:
                self.cold = False
                warm_up(order["spec"])
            server = os.getpid()
            pid = os.fork()
            if pid == 0:
                _child(self.call, order, server, [self.answers, self.wake, self._wake])
            self.children[pid] = order["run"]
            self.tell({"started": order["run"], "pid": pid})
            return
        number = signal.SIGTERM if "stop" in order else signal.SIGKILL
        for pid, task in self.children.items():
            if task == order.get("stop", order.get("kill")):
                _signal(pid, number)

    def reap(self) -> None:
        with suppress(BlockingIOError):
            os.read(self.wake, 1 << 12)
        for pid in list(self.children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.tell({"ended": self.children.pop(pid), "code": os.waitstatus_to_exitcode(status)})

    def close(self) -> None:
        for pid in self.children:
            _signal(pid, signal.SIGTERM)
        end = time.monotonic() + _PATIENCE
        while self.children and time.monotonic() < end:
            select.select([self.wake], [], [], 0.2)
            self.reap()
        for pid in self.children:
            _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    # The child leads a group of its own: its data-loader workers and ranks go with it.
    for send, target in ((os.killpg, pid), (os.kill, pid)):
        with suppress(ProcessLookupError, PermissionError):
            send(target, number)
            return


def _child(call: str, order: dict[str, Any], server: int, inherited: list[int]) -> NoReturn:
    code = 1
    module, _, name = call.rpartition(".")
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.setpgid(0, 0)
        _die_with_parent(server)
        for handle in inherited:
            os.close(handle)
        null, log = (
            os.open(os.devnull, os.O_RDONLY),
            os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
        )
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(order["environment"])
        if order["argv"]:
            # A command line of its own, which DDP runs again for every further rank.
            os.execv(sys.executable, [sys.executable, "-P", "-m", module, order["argv"]])
        code = getattr(importlib.import_module(module), name)(order["spec"])
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


def _die_with_parent(parent: int) -> None:
    """On Linux the kernel stops the child if the server is killed."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def main(call: str = CALL) -> int:
    """Import, then serve until the end of input.

    Args:
        call: Full name of a function that gets a spec and returns an exit code; its module, run with the path of a
            spec, does the same.
    """
    server = _Server(call)
    # As the documentation of gc.freeze advises before a fork: children share what was imported, and never collect it.
    gc.disable()
    for name in PRELOAD if call == CALL else ():
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    try:
        server.serve()
    finally:
        server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
