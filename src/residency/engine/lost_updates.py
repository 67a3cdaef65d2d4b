"""Parameters in half precision round small updates away: how many, said once per stage."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from residency.core.tensors import snapshot
from residency.core.types import Tensors

__all__ = ["lost_share", "told_if_lost"]

_HALF = (torch.float16, torch.bfloat16)
_MANY = 0.5


def lost_share(before: Tensors, after: Tensors, gradients: Tensors) -> float:
    """Share of the half-precision elements with a gradient that an optimizer step has left as they were.

    A bfloat16 has 8 bits: an update below 1/512 of a parameter is rounded to nothing, step after step.

    Args:
        before: Parameters before the step.
        after: The same after it.
        gradients: Of the step, by name; may lack names.
    """
    lost = count = 0
    for name, gradient in gradients.items():
        if after[name].dtype in _HALF:
            moving = gradient != 0
            count += int(moving.sum())
            lost += int((moving & (after[name] == before[name])).sum())
    return lost / count if count else 0.0


@contextmanager
def told_if_lost(leaves: Tensors) -> Iterator[None]:
    """Around the first optimizer step of a stage: warns where rounding loses most of it.

    Args:
        leaves: What trains; only half precision is looked at.
    """
    half = {name: leaf for name, leaf in leaves.items() if leaf.dtype in _HALF}
    before = snapshot(half)
    yield
    gradients = {name: leaf.grad for name, leaf in half.items() if leaf.grad is not None}
    share = lost_share(before, half, gradients)
    if share > _MANY:
        warnings.warn(
            f"{share:.0%} of the first step's updates are lost to rounding: the parameters that train are in half "
            "precision and the steps are too small for it. Load the backbone in float32 with trainer.precision "
            "bf16-mixed, train an adapter in float32, or raise the learning rate",
            stacklevel=2,
        )
