"""Train a tiny stream in a child that kills itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from residency.core import tensor_files as storage
from residency.testing.tiny_runs import train
from table import ADAPTERS, MITIGATIONS, OBJECTIVES

__all__ = ["PRELOAD", "Kill", "in_child"]

# What a child would otherwise import anew. Importing runs nothing in parallel, so forking afterwards is safe.
PRELOAD = [
    "residency.runs.stream",
    "residency.mitigations",
    "peft",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "torchmetrics.functional.text.rouge",
]


@dataclass(frozen=True)
class Kill:
    """When a child kills itself with SIGKILL.

    Args:
        stage: Stage from 1, with `step`: at the end of that optimizer step.
        step: See `stage`.
        write: Or at the n-th atomic write, from 1 ...
        moment: ... before it, with the temporary file written, or after the rename.
    """

    stage: int = 0
    step: int = 0
    write: int = 0
    moment: str = "before"


class _Killer(Callback):
    def __init__(self, kill: Kill) -> None:
        self.kill = kill

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        if (module.stage.index + 1, trainer.global_step) == (self.kill.stage, self.kill.step):
            os.kill(os.getpid(), signal.SIGKILL)


def _kill_at_write(kill: Kill) -> None:
    count = 0
    rename, sync = os.replace, storage.sync_folder

    def counted(step: Callable[..., Any], moment: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal count
            count += moment == "middle"
            if (count, moment) == (kill.write, kill.moment):
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args)

        return call

    # A write is: temporary file, rename, folder synced. `before` dies with the previous write complete.
    storage.os.replace = counted(rename, "middle")  # type: ignore[attr-defined]
    storage.sync_folder = counted(sync, "after")
    original = storage.replace_file

    def replace_file(path: Path, write: Callable[[Path], None]) -> None:
        if (count + 1, "before") == (kill.write, kill.moment):
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, write)

    for owner in ("residency.core.tensor_files", "residency.runs.score_files"):
        import_module(owner).replace_file = replace_file  # type: ignore[attr-defined]


def _child(
    folder: Path, backbone: Path, adapter: str, mitigations: Sequence[str], kill: Kill | None, options: Any
) -> None:
    torch.set_num_threads(1)
    callbacks = []
    if kill is not None and kill.write:
        _kill_at_write(kill)
    elif kill is not None:
        callbacks.append(_Killer(kill))
    if "stream" in options:  # objectives cannot be sent to another process: "module:function" makes them there
        place, _, maker = options["stream"].partition(":")
        given = {name: value for name, value in options.items() if name != "stream"}
        options = {**given, **getattr(import_module(place), maker)(folder.parent / "data")}
    parts = {name: MITIGATIONS[name].make() for name in mitigations}
    row = ADAPTERS[adapter]
    if "objective" in options:
        options = {**options, "objective": OBJECTIVES[options["objective"]].make()}
    train(folder, backbone, row.make(), parts, callbacks=callbacks, trainer=row.trainer, **{**row.options, **options})


def in_child(
    folder: Path, backbone: Path, adapter: str, mitigations: Sequence[str], kill: Kill | None = None, **options: Any
) -> int:
    """Train in a process of its own (imports come from a fork server); its exit code, -9 if it was killed.

    `options` are those of `tiny_runs.train`; `objective` is the name of a row, `stream` a function (`module:function`)
    that makes further ones of a folder for data.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_child, args=(folder, backbone, adapter, mitigations, kill, options))
    process.start()
    process.join(timeout=120)
    if process.is_alive():
        process.kill()
        time.sleep(0.1)
        raise TimeoutError("the child did not end in time")
    return int(process.exitcode or 0)
