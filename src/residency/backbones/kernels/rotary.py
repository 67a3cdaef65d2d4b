"""Rotary positions as one node of the graph.

    y = x ∘ cos + R x ∘ sin,   R (x₁, x₂) = (-x₂, x₁)        dx = dy ∘ cos + Rᵀ (dy ∘ sin)

(Su et al. 2021, in the halves of GPT-NeoX and Llama.) Transformers' own function makes of it slices, a negation, a
concatenation and three temporaries, and as many again in the backward pass, each slice with a tensor of zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from residency.backbones.kernels.autograd import apply, once_differentiable
from residency.core.types import untyped

__all__ = ["fuse_rotary", "rotate", "turn"]

# The name under which the attention of transformers' models looks the function up.
_NAME = "apply_rotary_pos_emb"
# Of values near one: rounding is some 1e-7, another layout of the halves is off by 1.
_TOLERANCE = 1e-5

_Function = Callable[..., tuple[Tensor, Tensor]]


def turn(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """y, or dx for `x` = dy; see above.

    Args:
        x: (..., d).
        cos: The same, or broadcast.
        sin: The same, or broadcast.
        back: Compute the gradient.

    Returns:
        (..., d).
    """
    half = x.shape[-1] // 2
    y = x * cos
    first, second = (sin[..., half:], sin[..., :half]) if back else (sin[..., :half], sin[..., half:])
    sign = 1 if back else -1
    y[..., :half].addcmul_(x[..., half:], first, value=sign)
    y[..., half:].addcmul_(x[..., :half], second, value=-sign)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return turn(query, cos, sin), turn(key, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return turn(dquery, cos, sin, back=True), turn(dkey, cos, sin, back=True), None, None


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions, differentiable once with respect to both.

    Args:
        query: (B, H, N, d), d even.
        key: (B, K, N, d).
        cos: (B or 1, N, d).
        sin: (B or 1, N, d).

    Returns:
        Both, in the memory order they came in.
    """
    turned: tuple[Tensor, Tensor] = apply(_Rotate, query, key, cos.unsqueeze(1), sin.unsqueeze(1))
    return turned


def fuse_rotary(model: nn.Module) -> int:
    """Let attention layers turn queries and keys by one node, where their own function computes the same.

    Asked of each function by trying: architectures differ in how they pair coordinates. The function is replaced in
    the layer's own copy of its forward; transformers' module is not touched.

    Returns:
        The number of layers.
    """
    known: dict[FunctionType, FunctionType | None] = {}
    count = 0
    for module in model.modules():
        forward: Any = type(module).forward
        if not isinstance(forward, FunctionType) or _NAME not in forward.__code__.co_names:
            continue
        if forward not in known:
            known[forward] = _with_rotation(forward)
        fused = known[forward]
        if fused is not None and "forward" not in vars(module):
            untyped(module).forward = MethodType(fused, module)
            count += 1
    return count


def _with_rotation(forward: FunctionType) -> FunctionType | None:
    """The same code, which finds our function under the name; `None` where that would be another function."""
    theirs = forward.__globals__.get(_NAME)
    if not callable(theirs) or not _is_plain(theirs):
        return None

    def ours(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # Half precision rounds in between; positions may turn only a part of each head (GPT-NeoX, Phi, Nemotron).
        full = query.shape[-1] == key.shape[-1] == cos.shape[-1] == sin.shape[-1] and cos.dim() == 3
        if args or kwargs or not full or any(x.dtype != torch.float32 for x in (query, key, cos, sin)):
            plain: tuple[Tensor, Tensor] = theirs(query, key, cos, sin, *args, **kwargs)
            return plain
        return rotate(query, key, cos, sin)

    names = {**forward.__globals__, _NAME: ours}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


@torch.no_grad()
def _is_plain(function: _Function) -> bool:
    draw = torch.Generator().manual_seed(0)
    query, key, cos, sin = (torch.randn(*shape, 8, generator=draw) for shape in ((1, 4, 3), (1, 2, 3), (1, 3), (1, 3)))
    try:
        expected = function(query, key, cos, sin)
    except Exception:  # another signature: not ours to replace
        return False
    if not isinstance(expected, tuple) or len(expected) != 2:
        return False
    found = rotate(query, key, cos, sin)
    return all(
        e.shape == f.shape and bool((e - f).abs().max() <= _TOLERANCE) for e, f in zip(expected, found, strict=True)
    )
