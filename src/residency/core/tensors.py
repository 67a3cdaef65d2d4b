"""Small functions on named tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.parts import in_parts
from residency.core.types import Tensors

__all__ = [
    "Computed",
    "Products",
    "Term",
    "on_device",
    "remembered",
    "size_in_bytes",
    "snapshot",
    "swapped",
    "terms_of",
    "weighted_sum",
    "wide",
]

_HALF = (torch.float16, torch.bfloat16)

Term = tuple[float, Tensor, Tensor]
"""(c, L, R): the product c L R with L (out, r) and R (r, in)."""


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


class Products(Computed):
    """Named tensors of which some are sums of products and known by their factors.

    A linear mixture of such tensors is one again, [c1 L1, c2 L2] [R1; R2], so that an adapter can take it without an
    (out, in) matrix ever being formed, and exactly where its rank suffices.

    Args:
        names: The keys, in order.
        compute: Gives the whole tensor of one name.
        terms: Gives the products whose sum it is; `None` where it is no product.
    """

    def __init__(
        self,
        names: Iterable[str],
        compute: Callable[[str], Tensor],
        terms: Callable[[str], Sequence[Term] | None],
    ) -> None:
        super().__init__(names, compute)
        self.terms = terms


def terms_of(tensors: Tensors, name: str) -> Sequence[Term] | None:
    """The products whose sum a named tensor is; `None` where it is not known by factors."""
    return tensors.terms(name) if isinstance(tensors, Products) else None


def wide(tensor: Tensor) -> Tensor:
    """In float64, or in float32 on a device that has nothing wider (mps)."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def weighted_sum(parts: Sequence[tuple[float, Tensors]]) -> Tensors:
    """Σ c θ, name by name, when read; in float64, so that neither the order nor the number of equal parts shows.

    Args:
        parts: (c, θ), at least one; same names and shapes. Integer tensors are those of the last one.
    """
    like = parts[-1][1]

    def compute(name: str) -> Tensor:
        last = like[name]
        if not last.is_floating_point():
            return last
        total = torch.zeros_like(wide(last))
        for factor, tensors in parts:
            total += factor * wide(tensors[name])
        return total.to(last.dtype)

    def terms(name: str) -> Sequence[Term] | None:
        found: list[Term] = []
        for factor, tensors in parts:
            products = terms_of(tensors, name)
            if products is None:
                return None
            found += [(factor * c, left, right) for c, left, right in products]
        return found

    return Products(like, compute, terms)


def remembered(tensors: Tensors) -> dict[str, Tensor]:
    """Detached copies, half precision in float32: what is kept and added to must not be rounded to what trains."""
    kept = snapshot(tensors)
    return {name: tensor.float() if tensor.dtype in _HALF else tensor for name, tensor in kept.items()}


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

    Raises:
        UserError: A leaf is in parts.
    """
    if cut := [name for name in values if in_parts(leaves[name])]:
        raise UserError(
            f"other values for {len(cut)} weights of which every rank has a part, first {cut[0]!r}",
            why="who puts them together reads the parts, and would never see the values",
            fix="set trainer.strategy to ddp, which keeps the whole model on every device",
        )
    own = {name: leaves[name].data for name in values}
    try:
        for name, value in values.items():
            leaves[name].data = value.to(leaves[name].dtype)
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


def on_device(value: Tensor | dict[str, Tensor], device: torch.device) -> Tensor | dict[str, Tensor]:
    """A tensor, or named tensors, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return {name: tensor.to(device) for name, tensor in value.items()}
