"""Commands in processes of their own, forked from one that has imported everything: a kill costs one second, not ten.

What a sweep starts by itself (its server of workers) is forked likewise; below that everything is the product's. On
SIGUSR1 each of these processes writes the stacks of its threads into its log.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

from residency.__main__ import main
from residency.study.executors import forkserver, local
from support.killed_runs import PRELOAD

__all__ = ["descendants", "kill", "stacks", "standing_in", "start"]

_PRELOAD = (*PRELOAD, *forkserver.PRELOAD, "residency.study.runner", "residency.report.page.build", __name__)


def start(words: Sequence[object], *, cwd: Path, log: Path, obey_modes: bool = False) -> BaseProcess:
    """Start a command.

    Args:
        words: After the program's name.
        cwd: Where it stands.
        log: What it prints is added here.
        obey_modes: Without the right of root to read and write whatever the modes of files say.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    process = context.Process(target=_child, args=([*map(str, words)], cwd, log, obey_modes))
    process.start()
    return process


def _child(words: list[str], cwd: Path, log: Path, obey_modes: bool) -> None:
    os.setsid()
    os.chdir(cwd)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    faulthandler.register(signal.SIGUSR1, file=2)
    if obey_modes:
        _give_up_overrides()
    os.environ["WANDB_MODE"] = "disabled"
    torch.set_num_threads(1)
    local.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=_server, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
    )
    os._exit(main(words))


def _give_up_overrides() -> None:
    """Root's rights over files of others (capabilities(7)): DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER."""
    if os.geteuid() != 0:
        return
    version = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two words of effective, permitted, inheritable each
    header, data = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    for place in (0, 1):
        data[place] &= ~0b1110
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def _server(command: Sequence[str], **options: Any) -> _ForkedServer | subprocess.Popen[bytes]:
    """The server of a sweep's workers."""
    # A lock that another thread holds at a fork (of an import, say) is never released in the child.
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(20)
    if threading.active_count() == 1:
        return _ForkedServer(command, **options)
    return subprocess.Popen([sys.executable, "-P", "-c", _PROGRAM, command[-1]], **options)


_PROGRAM = (
    "import faulthandler, signal, sys; faulthandler.register(signal.SIGUSR1, file=2)\n"
    "from residency.study.executors import forkserver; sys.exit(forkserver.main(sys.argv[1]))"
)


class _ForkedServer:
    """`python -m residency.study.executors.forkserver` without a new interpreter."""

    def __init__(self, command: Sequence[str], *, stderr: IO[bytes], env: Mapping[str, str], **_: Any) -> None:
        orders, self_orders = os.pipe()
        self_answers, answers = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for handle, place in ((orders, 0), (answers, 1), (stderr.fileno(), 2)):
                os.dup2(handle, place)
            os.closerange(3, 1024)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(env)
            os._exit(forkserver.main(command[-1]))
        os.close(orders)
        os.close(answers)
        self.stdin, self.stdout = os.fdopen(self_orders, "wb"), os.fdopen(self_answers, "rb")

    def wait(self, timeout: float | None = None) -> int:
        """The exit code."""
        end = time.monotonic() + (timeout or 1e9)
        while self.returncode is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("forkserver", timeout or 0.0)
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.01)
        return self.returncode

    def terminate(self) -> None:
        """SIGTERM."""
        kill([self.pid], signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        kill([self.pid], signal.SIGKILL)


def kill(pids: Sequence[int], number: int = signal.SIGKILL) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Children of a process and theirs, as they are now."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def standing_in(folder: Path) -> list[int]:
    """Living processes whose working directory it is: commands that were started there, and what they have left."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cwd").readlink() == folder:
                found.append(int(process.name))
    return found


def stacks(folder: Path, logs: Sequence[Path], *, wait: float = 3.0) -> str:
    """What every thread of the processes that stand in a folder does.

    Args:
        folder: The folder.
        logs: Where they write.
        wait: Seconds for writing.
    """
    sizes = {log: log.stat().st_size for log in logs}
    pids = standing_in(folder)
    kill(pids, signal.SIGUSR1)
    time.sleep(wait)
    texts = [f"processes: {pids}"]
    for log, size in sizes.items():
        if added := log.read_bytes()[size:].decode(errors="replace"):
            texts.append(f"== {log}\n{added}")
    return "\n".join(texts)
