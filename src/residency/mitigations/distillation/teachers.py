"""Teachers without a second model: the pretrained model, or earlier values of the trainable leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from residency.core.tensors import swapped
from residency.core.types import Batch, Tensors
from residency.mitigations.contract import StageModule

__all__ = ["follow", "run_as", "teacher_logits"]

Result = TypeVar("Result")


@torch.no_grad()
def run_as(module: StageModule, weights: Tensors, run: Callable[[], Result]) -> Result:
    """Run something without gradient and in evaluation mode (no dropout), on other trainable leaves.

    Args:
        module: The module; it is left as it was found.
        weights: Values of some or all trainable leaves; none = the model as it is.
        run: What to run.
    """
    training = module.model.training
    module.model.eval()
    try:
        with swapped(module.adapter.trainable(module.model) if weights else {}, weights):
            return run()
    finally:
        module.model.train(training)


def teacher_logits(module: StageModule, batch: Batch, weights: Tensors | None) -> Tensor:
    """(M', V') logits of a teacher (`Backbone.distilled`), without gradient.

    Args:
        module: The module.
        batch: What it reads.
        weights: Its trainable leaves; `None` = the pretrained model, none = the model as it is.
    """
    if weights is None:
        return module.reference_forward(batch)
    return run_as(module, weights, lambda: module.backbone.distilled(module.model, batch))


@torch.no_grad()
def follow(teacher: Tensors, leaves: Tensors, *, rate: float) -> dict[str, Tensor]:
    """One step of an exponential moving average: (1 - rate) teacher + rate leaves, name by name."""
    return {name: torch.lerp(value, leaves[name].detach().to(value.dtype), rate) for name, value in teacher.items()}
