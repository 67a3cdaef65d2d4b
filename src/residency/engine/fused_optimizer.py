"""torch's own fused optimizer kernels, where the user left the choice open."""

from __future__ import annotations

import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

__all__ = ["fuse"]

_FUSED = (Adagrad, Adam, AdamW, SGD)
_DEVICES = ("cpu", "cuda")


def fuse(optimizer: Optimizer) -> Optimizer:
    """Switch an optimizer of torch to its fused kernel: one call per step instead of a dozen per parameter.

    The formula is the same; the last bits are not. Left alone: optimizers of other classes, a choice of `foreach`,
    `fused`, `capturable` or `differentiable` by the user, and parameters the kernel does not take.

    Args:
        optimizer: Fresh; nothing has been stepped.

    Returns:
        The same object.
    """
    chosen = ("foreach", "fused", "capturable", "differentiable")
    if type(optimizer) not in _FUSED or any(optimizer.defaults.get(key) for key in chosen):
        return optimizer
    if optimizer.defaults.get("fused") is not None or optimizer.defaults.get("foreach") is not None:
        return optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # Contiguous: the kernel walks memory, and a state that comes back from a checkpoint has lost its strides.
    if not all(p.device.type in _DEVICES and p.is_floating_point() and p.is_contiguous() for p in parameters):
        return optimizer
    if any(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups):
        return optimizer
    for group in (optimizer.defaults, *optimizer.param_groups):
        group["fused"] = True
    return optimizer
