"""What a node of a Ray cluster does: a local executor of one worker carries the task out."""

from __future__ import annotations

import functools
import os
import signal
import socket
import time
from importlib.metadata import version
from pathlib import Path

from residency.core.errors import EXIT_SIGNAL, EXIT_USER
from residency.study.executors.base import Task
from residency.study.executors.local import LocalExecutor

__all__ = ["carry_out"]

_GRACE_SECONDS = 20.0  # how long a task that is asked to stop may take


@functools.cache
def _worker(call: str, threads: int, devices: tuple[str, ...], logs: Path) -> LocalExecutor:
    """Of a Ray worker, kept for its next task: only the first one pays for the imports."""
    # In an allocation Lightning would take every stage for a task of srun, and wait for the others.
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]
    return LocalExecutor(workers=1, threads=threads, devices=devices, logs=logs, call=call)


def carry_out(task: Task, threads: int, logs: Path, release: str, call: str) -> tuple[int, str]:
    """The Ray task.

    Args:
        task: What is to be done.
        threads: Threads to compute with.
        logs: Folder for what the task prints.
        release: Of residency, where the study runs.
        call: What carries the task out.

    Returns:
        (exit code, message) of its outcome.
    """
    # A node that a script has started in the background ignores SIGINT, and no cancellation would ever arrive.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    here = socket.gethostname()
    if version("residency") != release:
        return EXIT_USER, f"{here} has residency {version('residency')}, the study runs {release}; install the same"
    if not logs.is_dir():
        told = f"{here} does not see {logs}; the study's folder must be on a file system that all nodes share"
        return EXIT_USER, told
    # Ray has chosen the devices of this task; one without any would see them all.
    devices = tuple(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))) if task.resources.gpus else ()
    try:
        worker = _worker(call, threads, devices, logs)
    except KeyboardInterrupt:
        return EXIT_SIGNAL, "stopped before it began"
    return _finish(worker, task)


def _finish(worker: LocalExecutor, task: Task) -> tuple[int, str]:
    """Run a task to its end; a cancellation (`KeyboardInterrupt`) asks it to stop, and waits."""
    submitted, deadline = False, float("inf")
    while True:
        try:
            if not submitted:
                submitted = True
                worker.submit(task)
            for outcome in worker.wait(0.5):
                return outcome.exit_code, outcome.message
            if time.monotonic() > deadline:
                worker.close()
                _worker.cache_clear()
                return EXIT_SIGNAL, "killed: it did not stop when asked"
        except KeyboardInterrupt:
            worker.cancel(task.id)
            deadline = time.monotonic() + _GRACE_SECONDS
