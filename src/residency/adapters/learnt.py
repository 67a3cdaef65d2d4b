"""Which domains a model has learnt, in order, kept as buffers of the model: names survive in a state of tensors."""

from __future__ import annotations

import re

import torch
from torch import nn

from residency.types import Tensors

__all__ = ["LEARNT", "learn", "learnt", "relearn"]

LEARNT = re.compile(r"learnt_(\d{3})$")


def learn(model: nn.Module, index: int, domain: str) -> None:
    """Note that the domain at a position of the stream (from 0) is learnt; its name is kept as UTF-8 bytes."""
    name = torch.tensor(list(domain.encode()), dtype=torch.uint8)
    model.register_buffer(f"learnt_{index:03d}", name.to(next(model.parameters()).device))


def learnt(model: nn.Module) -> dict[str, int]:
    """Domain -> position, in the order of learning."""
    found = {int(m[1]): t for name, t in model.named_buffers(recurse=False) if (m := LEARNT.match(name))}
    return {bytes(found[index].tolist()).decode(): index for index in sorted(found)}


def relearn(model: nn.Module, state: Tensors) -> None:
    """Replace what a model has learnt by what a state says."""
    for name in [name for name, _ in model.named_buffers(recurse=False) if LEARNT.match(name)]:
        delattr(model, name)
    for name, tensor in state.items():
        if match := LEARNT.match(name):
            learn(model, int(match[1]), bytes(tensor.tolist()).decode())
