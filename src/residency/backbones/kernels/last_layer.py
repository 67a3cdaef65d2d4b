"""The feed-forward part of the last layer only where its output is read.

Behind the last attention every token goes its own way, and the head reads the supervised positions alone. What the last
feed-forward part computes for the others (a prompt of 80 tokens before a completion of three) goes nowhere, and nothing
comes back from there: their gradient is zero. Leaving them out is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from residency.backbones.kernels.hooks import watched
from residency.core.types import untyped

__all__ = ["is_trimmed", "only_at", "trim_last_layer", "trimmed_part"]

# Positions of a packed row that the head reads, each once.
_read: ContextVar[Tensor | None] = ContextVar("read", default=None)

# Above this share of the row the copies cost what is saved.
_WORTH_IT = 0.75
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
_LOOSE = 2e-2


@contextmanager
def only_at(positions: Tensor, *, distinct: bool = False) -> Iterator[None]:
    """Nothing but these positions of the packed row is read behind the last layer.

    Args:
        positions: (M,), in any order; may repeat.
        distinct: Whether they are known to be in order and not to repeat. A GPU is then not waited for.
    """
    token = _read.set(positions if distinct else positions.unique())
    try:
        yield
    finally:
        _read.reset(token)


class _Trimmed:
    """The forward of a feed-forward part that has `only_at` in mind; steps aside where somebody watches."""

    def __init__(self, part: nn.Module, around: list[nn.Module]) -> None:
        self._part = part
        self._around = around

    def __call__(self, x: Tensor) -> Tensor:
        plain = type(self._part).forward
        positions = _read.get()
        if positions is None or x.dim() != 3 or len(x) != 1 or not self.takes(x.shape[1], len(positions)):
            result: Tensor = plain(self._part, x)
            return result
        y: Tensor = plain(self._part, x[:, positions])
        return y.new_zeros(1, x.shape[1], y.shape[2]).index_copy(1, positions, y)

    def takes(self, positions: int, read: int) -> bool:
        """Whether a row of so many positions is cut to those that are read."""
        seen = any(map(watched, self._around)) or any(map(watched, self._part.modules()))
        return read <= _WORTH_IT * positions and not seen


def trimmed_part(model: nn.Module) -> nn.Module | None:
    """The feed-forward part that computes only what is read of a packed row; `None` = none does."""
    return next((part for part in model.modules() if isinstance(vars(part).get("forward"), _Trimmed)), None)


def is_trimmed(part: nn.Module, *, positions: int, read: int) -> bool:
    """Whether such a part leaves something of a packed row out of which so many positions are read."""
    forward = vars(part).get("forward")  # a kernel that is not exact is taken away again
    return isinstance(forward, _Trimmed) and forward.takes(positions, read)


def trim_last_layer(model: nn.Module) -> bool:
    """Let the last layer skip what nobody reads, where its shape is known and trying finds the same values.

    Args:
        model: Without gradient checkpointing, which would compute the part again when nobody knows the positions.

    Returns:
        Whether it does.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return False
    last: Any = layers[-1]
    part = getattr(last, "mlp", None)
    if not isinstance(part, nn.Module) or not _is_position_wise(part):
        return False
    # Whoever has hooked into the layer or into what follows it wants to see all positions.
    inner: Any = model.model
    around = [model, inner, layers, last, *(child for child in inner.children() if child is not layers)]
    untyped(part).forward = _Trimmed(part, around)
    return True


@torch.no_grad()
def _is_position_wise(part: nn.Module) -> bool:
    linear = [child for child in part.modules() if type(child) is nn.Linear]
    up = getattr(part, "up_proj", None)
    if not linear or not isinstance(up, nn.Linear) or len(linear) > 3:
        return False  # a mixture of experts counts its tokens
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, up.in_features, generator=draw).to(up.weight)
    at = torch.tensor([1, 3], device=x.device)
    whole, found = part(x), part(x[:, at])
    if not isinstance(whole, Tensor) or not isinstance(found, Tensor):
        return False
    difference = (whole[:, at] - found).abs().max()
    return bool(difference <= _TOLERANCE.get(whole.dtype, _LOOSE) * whole.abs().max().clamp_min(1e-6))
