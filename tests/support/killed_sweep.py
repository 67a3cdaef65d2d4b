"""A sweep in a process of its own, which may kill itself at the n-th thing that it brings to the disk."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from residency.core import tensor_files as storage
from residency.runs.store import store
from support.killed_runs import PRELOAD
from support.tiny_sweeps import run_sweep

__all__ = ["in_child"]


def _killed_at(count: int) -> None:
    """SIGKILL when something has been brought to the disk for the n-th time; 0 = never."""
    seen = 0
    original = storage.sync_folder

    def sync(folder: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        original(folder)

    for module in (storage, store):
        module.sync_folder = sync


def _child(path: Path, into: Path, at: int, options: Any) -> None:
    torch.set_num_threads(1)
    os.environ["WANDB_MODE"] = "disabled"
    _killed_at(at)
    code, out = run_sweep(path, into, **options)
    print(out, file=sys.stderr)
    os._exit(code)


def in_child(path: Path, into: Path, *, at: int = 0, **options: Any) -> Any:
    """Start a sweep in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "residency.runs.cli", "residency.study.planning.prepare"])
    process = context.Process(target=_child, args=(path, into, at, options))
    process.start()
    return process
