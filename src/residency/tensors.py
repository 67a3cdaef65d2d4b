"""Small functions on named tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from residency.types import Tensors

__all__ = ["Computed", "size_in_bytes", "snapshot", "swapped"]


class Computed(Mapping[str, Tensor]):
    """Named tensors that are computed when they are read, one at a time, and never kept.

    The weights of a large model in a dense space (the update B A of every LoRA layer) exist so for one layer at a
    time only.

    Args:
        names: The keys, in order.
        compute: Gives the tensor of one name; must be pure.
    """

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def snapshot(tensors: Tensors) -> dict[str, Tensor]:
    """Detached copies that later steps do not change."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@contextmanager
def swapped(leaves: Tensors, values: Tensors) -> Iterator[None]:
    """Inside the context the leaves have other values; a graph that was built before it is differentiated as if nothing
    had happened, because the leaves have their own memory again by then.

    Args:
        leaves: Live leaves by name.
        values: Values of some or all of them, same shapes.
    """
    own = {name: leaves[name].data for name in values}
    try:
        for name, value in values.items():
            leaves[name].data = value
        yield
    finally:
        for name, data in own.items():
            leaves[name].data = data


def size_in_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested mappings and sequences."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, Mapping):
        return sum(size_in_bytes(value) for value in tree.values())
    if isinstance(tree, list | tuple):
        return sum(size_in_bytes(value) for value in tree)
    return 0
