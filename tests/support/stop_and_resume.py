"""A stream that is stopped inside its second stage and goes on, against one that was never stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from residency.adapters import Adapter
from residency.core.signals import Stopped
from residency.core.tensor_files import load_tree
from residency.mitigations import Mitigation
from residency.runs.folder import RunFolder
from residency.testing.tiny_runs import train

__all__ = ["goes_on_exactly", "history"]


class _Stop(Callback):
    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        if (module.stage.index, trainer.global_step) == (1, 3):
            raise Stopped("SIGKILL")


def goes_on_exactly(
    folder: Path,
    backbone: Path,
    adapter: Callable[[], Adapter],
    make: Callable[[], Mapping[str, Mitigation]],
    **options: Any,
) -> list[dict[str, Any]]:
    """Assert that scores, weights, mitigation states and logged losses are equal bit for bit.

    Returns:
        The history of the run that went on.
    """
    options = {"steps": 5, "kinds": {"a": "generative", "b": "label"}, **options}
    options["trainer"] = {"log_every_n_steps": 1, **options.get("trainer", {})}
    whole, _ = train(folder / "whole", backbone, adapter(), make(), **options)
    with pytest.raises(Stopped):
        train(folder / "stopped", backbone, adapter(), make(), callbacks=[_Stop()], **options)
    assert list((folder / "stopped").glob("stages/2-*/checkpoint.safetensors")), "nothing to go on from"
    again, _ = train(folder / "stopped", backbone, adapter(), make(), **options)
    assert again["scores"] == whole["scores"]
    for counted in ("train_tokens", "batch_tokens", "training_flops"):
        assert again["cost"][counted] == whole["cost"][counted], counted
    ends = [load_tree(next((folder / run).glob("stages/2-*/state.safetensors"))) for run in ("whole", "stopped")]
    assert {*_leaves(ends[0])} == {*_leaves(ends[1])}
    wrong = [name for name, tensor in _leaves(ends[0]).items() if not torch.equal(tensor, _leaves(ends[1])[name])]
    assert not wrong
    lines, wanted = history(folder / "stopped"), history(folder / "whole")
    assert [_losses(line) for line in lines] == [_losses(line) for line in wanted]
    return lines


def history(folder: Path) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    return RunFolder(folder).history()


def _leaves(tree: Mapping[str, Any], path: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{path}/{name}")
        elif isinstance(value, torch.Tensor):
            found[f"{path}/{name}"] = value
    return found


def _losses(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("seconds", "time", "lr")}
