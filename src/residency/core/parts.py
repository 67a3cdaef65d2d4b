"""Tensors of which every process has a part (`DTensor`): put together, and written into.

Everything here is the tensor itself where it is whole, so that callers need not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from residency.core.errors import UserError

__all__ = [
    "check_optimizers",
    "cut_states",
    "in_parts",
    "local",
    "put_into",
    "stepped",
    "whole",
    "whole_states",
]

_NUMBER_BY_NUMBER = (
    *("AdamW", "SGD", "Adam", "Adamax", "NAdam", "RAdam"),
    *("RMSprop", "Adagrad", "Adadelta", "Rprop", "ASGD"),
)


def in_parts(tensor: Tensor) -> bool:
    """Whether this process has a part of it."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this process has of it; the tensor itself if it is whole."""
    parts: Any = tensor
    own: Tensor = parts.to_local() if in_parts(tensor) else tensor
    return own


def whole(tensor: Tensor) -> Tensor:
    """All of it, on the CPU if it was in parts. Called by all ranks."""
    parts: Any = tensor
    full: Tensor = parts.full_tensor().cpu() if in_parts(tensor) else tensor
    return full


@torch.no_grad()
def put_into(live: Tensor, value: Tensor) -> None:
    """Copy a tensor into one of its shape that may be in parts. Every rank has all of the value; nothing is sent."""
    if in_parts(live) and not in_parts(value):
        local(live).copy_(_own_part(value, live))
    else:
        live.copy_(value)


def _own_part(value: Tensor, like: Any) -> Tensor:
    """The slice of a whole tensor that this process would have, cut as another one of its shape is."""
    (placement,) = like.placements
    slices = value.chunk(like.device_mesh.size(), dim=placement.dim)
    place = like.device_mesh.get_local_rank()
    # A short tensor has none for the last processes.
    return slices[place] if place < len(slices) else value.narrow(placement.dim, 0, 0)


def cut_states(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's whole `state_dict`, cut as what it steps is: no device ever has all of it."""
    places = (place for group in state["param_groups"] for place in group["params"])
    leaves = dict(zip(places, stepped(optimizer), strict=True))

    def cut(value: Any, leaf: Tensor) -> Any:
        if not (isinstance(value, Tensor) and in_parts(leaf) and value.shape == leaf.shape):
            return value
        made = torch.empty_like(leaf, requires_grad=False)
        put_into(made, value)
        return made

    entries = {
        place: {name: cut(value, leaves[place]) for name, value in entry.items()}
        for place, entry in state["state"].items()
    }
    return {**state, "state": entries}


def stepped(optimizer: Optimizer) -> list[Tensor]:
    """What an optimizer steps."""
    return [leaf for group in optimizer.param_groups for leaf in group["params"]]


def check_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Whether what is in parts is stepped number by number, which is the same on parts and on the whole.

    Raises:
        UserError: Naming the first optimizer that is not known to.
    """
    for optimizer in optimizers:
        kind = type(optimizer)
        known = kind.__module__.startswith("torch.optim.") and kind.__name__ in _NUMBER_BY_NUMBER
        if not known and any(map(in_parts, stepped(optimizer))):
            raise UserError(
                f"model.optimizer ({kind.__name__}) with trainer.strategy ModelParallelStrategy",
                why="what trains is in parts, and one that looks at more than a number at once would see a part of it",
                fix=f"use one of torch.optim ({', '.join(_NUMBER_BY_NUMBER)}), or set trainer.strategy to ddp",
            )


def whole_states(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's `state_dict` whose tensors are whole. Called by all ranks."""
    entries = {
        place: {name: whole(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        for place, entry in state["state"].items()
    }
    return {**state, "state": entries}
