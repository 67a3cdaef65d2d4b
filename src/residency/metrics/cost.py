"""What a result cost (E21). Pure functions of counts; the counts are collected by the stream."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from residency.core.parts import local

__all__ = ["optimizer_state_bytes", "overhead", "tokens_per_second"]


def tokens_per_second(*, tokens: int, seconds: float) -> float:
    """Non-pad tokens per second; NaN without a clock."""
    return tokens / seconds if seconds > 0 else math.nan


def overhead(*, seconds: float, plain_seconds: float) -> float:
    """What a mitigation adds to the plain run's time, as a share: 0.5 = half as long again. NaN without a clock."""
    return seconds / plain_seconds - 1.0 if plain_seconds > 0 else math.nan


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all memory that an optimizer holds between steps beside the parameters it steps and their gradients.

    Moments, projections, tables of 8-bit states; what a wrapper's inner optimizers hold, and the low-rank parameters
    that they step. Memory that several tensors share counts once; of what is in parts, this process's.
    """
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    seen: set[int] = set()
    storages: dict[int, int] = {}

    def walk(value: Any) -> None:
        if id(value) in seen or id(value) in stepped:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            # By object: tensors without values, of which an estimate is made, have no address.
            storage: Any = local(value).untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        elif isinstance(value, Mapping):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list | tuple | set):
            for inner in value:
                walk(inner)
        elif isinstance(value, Optimizer):
            walk(vars(value))

    walk(optimizer)
    return sum(storages.values())
