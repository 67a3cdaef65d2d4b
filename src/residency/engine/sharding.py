"""A base in parts, one per process (FSDP2): each block of the model, and what is left around the blocks, is put
together from all parts before it is computed and taken apart again behind it.

What an adapter adds to a frozen base is left as it is: plain tensors, equal on all ranks, whose gradients are averaged
as without sharding. So mitigations, optimizers, checkpoints and states see what they always see, and only those that
read frozen weights, or pass the model on one rank alone, cannot take part.

Where the weights themselves train (full fine-tuning) they are in parts, and so are their gradients and what an
optimizer keeps of them; each block's backward pass leaves every rank its part of the mean gradient. States and
checkpoints are whole. Mitigations that read weights or gradients would see parts, and cannot take part either.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from residency.adapters.base import Adapter
from residency.backbones.base import Backbone
from residency.backbones.structure import blocks
from residency.core.errors import UserError
from residency.core.parts import local
from residency.core.ranks import ranks
from residency.core.types import untyped
from residency.mitigations.base import Mitigation
from residency.objectives.base import Objective

__all__ = ["LEFT_OUT", "base_in_parts", "check_observers", "check_shardable", "held_bytes", "trains_in_parts"]

LEFT_OUT = "base in parts: without the kernels of head, last layer and lanes, and without folding the adapter in"
"""What the record says: these look at weights outside of their block, or run a model on several threads."""

_OF_PART = {
    "adapter": "it reads weights, or steps parameters, of which every rank would have a part only",
    "objective": "as it is set it may pass the model more often on one rank than on another, which would wait for ever",
    "mitigations": "it reads frozen weights, of which every rank has a part, or is not known not to",
}
_READS = "it reads weights or gradients of what trains, of which every rank has a part under {}, or is not known not to"


def check_shardable(
    backbone: Backbone, adapter: Adapter, mitigations: Mapping[str, Mitigation], objective: Objective
) -> None:
    """Whether everything works with a base in parts, before a model is loaded.

    Raises:
        UserError: Naming the first part that does not, and why.
    """
    if backbone.family != "decoder" or getattr(backbone, "quantisation", None) is not None:
        raise _refusal("model.backbone", backbone, why="only decoders whose weights are not in 4 or 8 bits can be cut")
    parts: dict[str, Adapter | Mitigation | Objective] = {"model.adapter": adapter, "model.objective": objective}
    parts |= {f"model.mitigations.{name}": mitigation for name, mitigation in mitigations.items()}
    whole = not trains_in_parts(adapter)
    for place, part in parts.items():
        if not (_says(part, "shardable", value=True) or (part is adapter and not whole)):
            raise _refusal(place, part, why=_OF_PART[place.split(".")[1]])
        if part is objective and not whole and (objective.keeps_start or "fixed_coordinates" in objective.requires):
            raise _refusal(place, part, why="it brings back weights of an earlier time, and what trains is in parts")
        if isinstance(part, Mitigation) and not (whole or _says(part, "reads_weights", value=False)):
            raise _refusal(place, part, why=_READS.format(type(adapter).__name__))


def trains_in_parts(adapter: Adapter) -> bool:
    """Whether what an adapter trains is cut as well."""
    return _says(adapter, "trains_in_parts", value=True)


def _says(part: object, name: str, *, value: bool) -> bool:
    """Whether a part says something by its own word: what is derived from it may read what it does not."""
    return getattr(part, name) is value and (name in vars(part) or name in vars(type(part)))


def check_observers(observers: Mapping[str, object]) -> None:
    """Nobody looks inside a model of which rank 0 has a part.

    Raises:
        UserError: Naming the first observer.
    """
    for name, observer in observers.items():
        raise _refusal(
            f"inspection.{name}", observer, why="it looks inside the model on rank 0, which has a part of it"
        )


def _refusal(place: str, part: object, *, why: str) -> UserError:
    return UserError(
        f"{place} ({type(part).__name__}) with trainer.strategy ModelParallelStrategy",
        why=why,
        fix="set trainer.strategy to ddp, which keeps the whole model on every device, or leave this part out "
        "(docs/devices.md tells what works on parts)",
    )


@contextmanager
def base_in_parts(model: nn.Module, device: torch.device, *, adapter: Adapter) -> Iterator[None]:
    """Inside and afterwards, every rank keeps its part of every weight of the base. Called by all ranks.

    Args:
        model: With its adapter attached. What trains now, trains in every stage.
        device: Where to compute.
        adapter: Decides whether what trains is cut, too.
    """
    if not isinstance(model, FSDPModule):
        leaves = set() if trains_in_parts(adapter) else {p for p in model.parameters() if p.requires_grad}
        _cut(model, device, leaves)
    try:
        with warnings.catch_warnings():
            # Of what a block returns; nothing writes into it.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            yield
    finally:
        # What is around the blocks stays together behind a pass without gradients.
        untyped(model).reshard()


def _cut(model: nn.Module, device: torch.device, leaves: set[nn.Parameter]) -> None:
    """Cut everything but some leaves."""
    mesh = init_device_mesh(device.type, (ranks(),))
    # By default what is around the blocks stays together behind a pass: whoever read weights that train then, would
    # keep memory that is given back.
    behind = None if leaves else True
    for part in [*blocks(model).values(), model]:
        fully_shard(part, mesh=mesh, ignored_params=leaves, reshard_after_forward=behind)
    if hasattr(model, "generate"):
        # transformers writes by way of the model inside of the adapter's, whose forward would not be noticed.
        register_fsdp_forward_method(model, "generate")
    # Buffers that are made in inference mode, by scoring, could never be trained with.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def held_bytes(model: nn.Module) -> dict[str, int]:
    """Of the weights, as many as this process keeps between passes: `frozen_bytes` and `trained_bytes`."""
    held = {"frozen_bytes": 0, "trained_bytes": 0}
    for p in model.parameters():
        held["trained_bytes" if p.requires_grad else "frozen_bytes"] += local(p).nbytes
    return held
