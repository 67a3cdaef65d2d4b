"""What is equal bit for bit, what stood still, and who drew from a global generator."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from residency.core.types import Tensors
from residency.engine.module import ContinualModule

__all__ = ["assert_still", "clone", "differing", "generators", "live_tensors", "undrawn"]


def live_tensors(module: ContinualModule) -> Tensors:
    """Every parameter and buffer."""
    return dict(module.model.named_parameters()) | dict(module.model.named_buffers())


def assert_still(before: Tensors, live: Tensors, message: str) -> None:
    """Tensors against what they were."""
    for name, tensor in before.items():
        assert torch.equal(live[name].detach(), tensor), f"{message} {name}"


def clone(tree: Any) -> Any:
    """A copy of nested mappings and sequences that later steps do not change."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: clone(value) for key, value in tree.items()}
    return type(tree)(clone(value) for value in tree) if isinstance(tree, list | tuple) else tree


def differing(one: Any, other: Any, name: str = "") -> list[str]:
    """Where two trees are not equal bit for bit; what a clock said is not compared."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [name]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if {*one} != {*other}:
            return [f"{name}: {sorted({*map(str, one)} ^ {*map(str, other)})}"]
        return [
            found
            for key in one
            if not str(key).endswith("seconds")
            for found in differing(one[key], other[key], f"{name}/{key}")
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        both = enumerate(zip(one, other, strict=True))
        return [found for i, (a, b) in both for found in differing(a, b, f"{name}/{i}")]
    return [] if one == other else [name]


def generators() -> Any:
    """The state of every global generator that a mitigation could draw from."""
    numbers = np.random.get_state(legacy=False)["state"]
    return (torch.get_rng_state().numpy().tobytes(), random.getstate(), numbers["key"].tobytes(), numbers["pos"])


@contextmanager
def undrawn(what: str) -> Iterator[None]:
    """Nothing in the context may draw from a global generator."""
    before = generators()
    yield
    assert before == generators(), f"seed: {what} drew from a global generator"
