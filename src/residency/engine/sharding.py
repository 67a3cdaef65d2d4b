"""A frozen base in parts, one per process (FSDP2), under an adapter that every process has whole.

Each block of the model, and what is left around the blocks, is put together from all parts before it is computed and
taken apart again behind it. What trains is left as it is: plain tensors, equal on all ranks, whose gradients are
averaged as without sharding. So mitigations, optimizers, checkpoints and states see what they always see, and only
those that read frozen weights, or pass the model on one rank alone, cannot take part.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from residency.adapters.base import Adapter
from residency.backbones.base import Backbone
from residency.backbones.structure import blocks
from residency.core.errors import UserError
from residency.core.ranks import ranks
from residency.core.types import untyped
from residency.mitigations.base import Mitigation
from residency.objectives.base import Objective

__all__ = ["LEFT_OUT", "base_in_parts", "check_observers", "check_shardable", "frozen_bytes"]

LEFT_OUT = "base in parts: without the kernels of head, last layer and lanes, and without folding the adapter in"
"""What the record says: these look at weights outside of their block, or run a model on several threads."""

_OF_PART = {
    "adapter": "weights that train, or that its own passes read, are not beside the frozen base but in it",
    "objective": "it may pass the model more often on one rank than on another, which would wait for ever",
    "mitigations": "it reads frozen weights, of which every rank has a part, or is not known not to",
}


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
    for place, part in parts.items():
        if not _says_so(part):
            raise _refusal(place, part, why=_OF_PART[place.split(".")[1]])


def _says_so(part: Adapter | Mitigation | Objective) -> bool:
    """Whether a part is `shardable` by its own word: what is derived from it may read what it does not."""
    return part.shardable and ("shardable" in vars(part) or "shardable" in vars(type(part)))


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
def base_in_parts(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside and afterwards, every rank keeps its part of every frozen weight. Called by all ranks.

    Args:
        model: With its adapter attached. What trains now, trains in every stage.
        device: Where to compute.
    """
    if not isinstance(model, FSDPModule):
        _cut(model, device)
    try:
        with warnings.catch_warnings():
            # Of what a block returns; nothing writes into it.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            yield
    finally:
        # What is around the blocks stays together behind a pass without gradients.
        untyped(model).reshard()


def _cut(model: nn.Module, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (ranks(),))
    leaves = {p for p in model.parameters() if p.requires_grad}
    for part in [*blocks(model).values(), model]:
        fully_shard(part, mesh=mesh, ignored_params=leaves)
    if hasattr(model, "generate"):
        # transformers writes by way of the model inside of the adapter's, whose forward would not be noticed.
        register_fsdp_forward_method(model, "generate")
    # Buffers that are made in inference mode, by scoring, could never be trained with.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def frozen_bytes(model: nn.Module) -> int:
    """Of the weights that do not train, as many as this process keeps between passes."""
    frozen: list[Any] = [p for p in model.parameters() if not p.requires_grad]
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in frozen)
