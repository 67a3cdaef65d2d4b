"""Maximally interfered retrieval (Aljundi et al. 2019): replay what the coming step would hurt most."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from residency.core.types import Example, Tensors
from residency.mitigations.contract import StageModule
from residency.mitigations.rehearsal.model_views import evaluating, example_loss, passes, swapped

__all__ = ["interference", "most_interfered", "virtual_step"]


def virtual_step(parameters: Tensors, gradients: Tensors, *, size: float) -> dict[str, Tensor]:
    """θ - size · √d · g / ‖g‖: a step down the gradient that moves a parameter by `size` in the root mean square.

    Args:
        parameters: θ by name, d numbers in all.
        gradients: g by name; names may be missing (no gradient).
        size: Length per √d, so that it compares with the learning rate of Adam.

    Returns:
        The parameters that move, by name; all where they are if g = 0.
    """
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    count = sum(g.numel() for g in gradients.values())
    scale = size * math.sqrt(count) / norm if norm else 0.0
    return {name: parameters[name].detach() - scale * gradient for name, gradient in gradients.items()}


def interference(
    module: StageModule, current: Sequence[Example], candidates: Sequence[Example], *, size: float
) -> Tensor:
    """(C,) how much a virtual step on the current examples raises the loss of each candidate, in nats per token.

    Nothing is left behind: no gradient, no change of a weight, no draw.
    """
    leaves = {name: leaf for name, leaf in module.adapter.trainable(module.model).items() if leaf.requires_grad}
    gradients: dict[str, Tensor] = {}
    with evaluating(module), torch.enable_grad():
        for _, batch in passes(module, current):
            loss = module.example_losses(batch).sum()
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    gradients[name] = gradients[name] + gradient if name in gradients else gradient
    before = example_loss(module, candidates)
    with swapped(leaves, virtual_step(leaves, gradients, size=size)):
        return example_loss(module, candidates) - before


def most_interfered(rise: Tensor, count: int) -> list[int]:
    """The `count` candidates whose loss rises most, in descending order; of equals the first. Again from the start
    where there are fewer candidates.
    """
    order = rise.argsort(descending=True, stable=True).tolist()
    return [order[i % len(order)] for i in range(count)]
