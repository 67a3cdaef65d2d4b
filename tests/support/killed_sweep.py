"""A sweep in a process of its own, which may kill itself at the n-th thing that it brings to the disk."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
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


def _child(path: Path, into: Path, at: int, environment: Mapping[str, str], options: Any) -> None:
    torch.set_num_threads(1)
    # Forked from a server that may have been started before the environment was what it is.
    os.environ.update(environment)
    _killed_at(at)
    code, out = run_sweep(path, into, **options)
    print(out, file=sys.stderr)
    os._exit(code)


def in_child(path: Path, into: Path, *, at: int = 0, wandb: str = "disabled", **options: Any) -> Any:
    """Start a sweep in a process of its own; `wandb` is its WANDB_MODE."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    environment["WANDB_MODE"] = wandb
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "residency.runs.cli", "residency.study.planning.prepare"])
    process = context.Process(target=_child, args=(path, into, at, environment, options))
    process.start()
    return process
