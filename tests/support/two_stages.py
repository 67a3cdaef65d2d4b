"""Two tiny stages with a mitigation, each combination trained once."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from residency.adapters import Adapter, Full
from residency.adapters.peft import lora
from residency.core.signals import Stopped
from residency.core.tensor_files import load_tree
from residency.core.tensors import snapshot
from residency.engine.module import ContinualModule
from residency.mitigations import Mitigation
from residency.scorers.find import scorers_by_name
from residency.testing.tiny_runs import domains, train

__all__ = ["ADAPTERS", "LAST", "Named", "Pair", "equal", "randn", "two_stages"]

Named = dict[str, Tensor]
LAST = -1

ADAPTERS: dict[str, Callable[[], Adapter]] = {
    "full": Full,
    "lora": lambda: lora(target_modules="all-linear", r=2, lora_alpha=4),
}


class Steps(Callback):
    """The trainable leaves after every optimizer step, as the training left them."""

    def __init__(self) -> None:
        self.stages: list[list[Named]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.stages.append([])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.stages[-1].append(snapshot(pl_module.adapter.trainable(pl_module.model)))


class StopAt(Callback):
    """A signal at the end of a step of a stage (from 0), or after its `LAST`."""

    def __init__(self, stage: int, step: int) -> None:
        self.at = (stage, step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if (pl_module.stage.index, trainer.global_step) == self.at:
            raise Stopped("SIGKILL")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if (pl_module.stage.index, LAST) == self.at:
            raise Stopped("SIGKILL")


@dataclass(frozen=True)
class Pair:
    """What two stages left: the record, the steps of each that were run last, the module at the end."""

    record: dict[str, Any]
    steps: list[list[Named]]
    module: ContinualModule
    folder: Path

    def tree(self, k: int) -> Any:
        """As stored after stage k (from 1)."""
        return load_tree(self.folder / "stages" / ("1-a", "2-b")[k - 1] / "state.safetensors")

    @property
    def weights(self) -> list[Named]:
        """The adapter's state after each stage."""
        return [self.tree(1)["weights"], self.tree(2)["weights"]]

    @property
    def losses(self) -> list[float]:
        """Of every step of the first stage, as the history has them."""
        lines = (json.loads(line) for line in (self.folder / "history.jsonl").read_text().splitlines())
        return [line["loss/task"] for line in lines if line["stage"] == 1]


@cache
def two_stages(
    backbone: Path,
    adapter: str,
    make: Callable[[], Mitigation] | None = None,
    *,
    stop: tuple[int, int] | None = None,
    steps: int = 4,
) -> Pair:
    """Two tiny domains, `a` and `b`, each combination trained once per process.

    Args:
        backbone: Folder of the model.
        adapter: A name in `ADAPTERS`.
        make: A fresh mitigation; the very function is the key.
        stop: (stage from 0, step or `LAST`): stopped at the end of that step, and gone on with.
        steps: Of each stage.
    """
    folder = Path(tempfile.mkdtemp(prefix="pair-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def go(*callbacks: Callback) -> tuple[dict[str, Any], ContinualModule]:
        readers = domains(folder / "data", {"a": "generative", "b": "label"})
        for reader in readers.values():
            reader.scorers = scorers_by_name(["nll"], where="test")
        parts = {"x": make()} if make else {}
        more: dict[str, Any] = {"data": {"domains": readers}, "steps": steps, "callbacks": callbacks}
        return train(folder / "run", backbone, ADAPTERS[adapter](), parts, every=1, **more)

    if stop is not None:
        with pytest.raises(Stopped):
            go(StopAt(*stop))
    watch = Steps()
    record, module = go(watch)
    return Pair(record, watch.stages, module, folder / "run")


def equal(one: Named, other: Named) -> bool:
    """Bit for bit."""
    return {*one} == {*other} and all(torch.equal(one[name], other[name]) for name in one)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """A draw of its own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
