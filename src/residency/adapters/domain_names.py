"""Names of domains inside a state: adapters that answer by domain must know after a resume who learned what."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["KEY", "read_names", "write_names"]

KEY = "learned_domains"


def write_names(model: nn.Module, names: Sequence[str]) -> None:
    """Keep names, in order of learning, in a buffer of the model (UTF-8 JSON as bytes)."""
    model.register_buffer(KEY, torch.tensor(list(json.dumps(list(names)).encode()), dtype=torch.uint8))


def read_names(tensor: Tensor) -> list[str]:
    """The inverse, from the buffer or from a state."""
    names: list[str] = json.loads(bytes(tensor.tolist()))
    return names
