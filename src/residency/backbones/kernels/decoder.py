"""A decoder layer as one node of the graph: norm, attention, norm and gated feed-forward part, with or without LoRA.

    h = norm x         q, k, v = W h      x' = x + W_o attention(turn q, turn k, v)
    h' = norm x'       g, u = W h'        y = x' + W_d (silu(g) ∘ u)

As modules this is some fifty calls and fifteen nodes per layer, which Python walks through while the processor waits;
as one node it is the arithmetic alone. The thin LoRA products of layers that read the same input are one product, and
sums of gradients are made by the products themselves. Nothing is approximated; gradients are those of the chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from residency.backbones.kernels import lora
from residency.backbones.kernels.autograd import apply, once_differentiable
from residency.backbones.kernels.lora import Linear
from residency.backbones.kernels.norm import normalise, normalise_back
from residency.backbones.kernels.rotary import turn
from residency.backbones.kernels.segments import Seen, attend, attend_back

__all__ = ["Norm", "Parts", "decoder_layer"]


class Norm(NamedTuple):
    """An RMS norm whose weight, (D,), is not trained."""

    weight: Tensor
    epsilon: float


class Parts(NamedTuple):
    """What a layer consists of.

    Attributes:
        linear: The layers q, k, v, o, gate, up and down.
        norms: Before attention and before the feed-forward part.
        head_dim: d.
        scale: Of the attention logits.
    """

    linear: tuple[Linear, ...]
    norms: tuple[Norm, Norm]
    head_dim: int
    scale: float


class _Kept(NamedTuple):
    """What the backward pass reads of the first or the second half of a layer."""

    inverse: Tensor
    h: Tensor
    thin: Tensor | None
    before: tuple[Tensor, ...]  # q, k, v, or g, u
    inner: Tensor  # what the last linear layer reads
    inner_thin: Tensor | None
    totals: list[Tensor]


def decoder_layer(x: Tensor, cos: Tensor, sin: Tensor, seen: Seen, parts: Parts) -> Tensor:
    """y of a packed row; differentiable once with respect to x and to A and B of its linear layers.

    Args:
        x: (N, D), float32 on the CPU.
        cos: (N, 1, d).
        sin: (N, 1, d).
        seen: Of the row.
        parts: Of the layer.

    Returns:
        (N, D).
    """
    trained = [tensor for layer in parts.linear for tensor in (layer.a, layer.b)]
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, *trained)):
        middle, _ = _first_half(x, cos, sin, seen, parts)
        return _second_half(middle, parts)[0]
    y: Tensor = apply(_DecoderLayer, x, cos, sin, seen, parts, *trained)
    return y


def _first_half(x: Tensor, cos: Tensor, sin: Tensor, seen: Seen, parts: Parts) -> tuple[Tensor, _Kept]:
    norm, d = parts.norms[0], parts.head_dim
    h, inverse = normalise(x, *norm)
    (q, k, v), thin = lora.forward(h, parts.linear[:3])
    q, k, v = (tensor.view(x.shape[0], -1, d) for tensor in (q, k, v))
    q, k = turn(q, cos, sin), turn(k, cos, sin)
    out, totals = attend(q, k, v, seen, parts.scale)
    inner = out.view(x.shape[0], -1)
    (y,), inner_thin = lora.forward(inner, parts.linear[3:4])
    return y.add_(x), _Kept(inverse, h, thin, (q, k, v), inner, inner_thin, totals)


def _second_half(x: Tensor, parts: Parts) -> tuple[Tensor, _Kept]:
    h, inverse = normalise(x, *parts.norms[1])
    (g, u), thin = lora.forward(h, parts.linear[4:6])
    inner = F.silu(g).mul_(u)
    (y,), inner_thin = lora.forward(inner, parts.linear[6:])
    return y.add_(x), _Kept(inverse, h, thin, (g, u), inner, inner_thin, [])


def _second_half_back(dy: Tensor, x: Tensor, kept: _Kept, parts: Parts) -> tuple[Tensor, list[Tensor | None]]:
    """dx and the gradients of gate, up and down: A, B, A, B, ..."""
    g, u = kept.before
    dinner, *down = lora.backward([dy], kept.inner, parts.linear[6:], kept.inner_thin)
    assert dinner is not None
    # silu(g) again: as fast as it is read from memory, and not kept. What is new here is written over while at hand.
    du = F.silu(g).mul_(dinner)
    dg = dinner.mul_(u)
    torch.ops.aten.silu_backward.grad_input(dg, g, grad_input=dg)
    dh, *gate_up = lora.backward([dg, du], kept.h, parts.linear[4:6], kept.thin)
    assert dh is not None
    dx = normalise_back(dh, x, parts.norms[1].weight, kept.inverse).add_(dy)
    return dx, _alternating(gate_up, down)


def _first_half_back(
    dy: Tensor, x: Tensor, kept: _Kept, cos: Tensor, sin: Tensor, seen: Seen, parts: Parts, *, of_input: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx, where it is needed, and the gradients of q, k, v and o: A, B, A, B, ..."""
    n = x.shape[0]
    q, k, v = kept.before
    dinner, *last = lora.backward([dy], kept.inner, parts.linear[3:4], kept.inner_thin)
    assert dinner is not None
    out, dout = kept.inner.view(q.shape), dinner.view(q.shape)
    dq, dk, dv = attend_back(dout, q, k, v, out, kept.totals, seen, parts.scale)
    dq, dk = turn(dq, cos, sin, back=True), turn(dk, cos, sin, back=True)
    rows = [t.reshape(n, -1) for t in (dq, dk, dv)]
    dh, *first = lora.backward(rows, kept.h, parts.linear[:3], kept.thin, of_input=of_input)
    dx = None if dh is None else normalise_back(dh, x, parts.norms[0].weight, kept.inverse).add_(dy)
    return dx, _alternating(first, last)


def _alternating(*groups: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    return [tensor for das, dbs in groups for pair in zip(das, dbs, strict=True) for tensor in pair]


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, seen: Seen, parts: Parts, *trained: Tensor | None
    ) -> Tensor:
        middle, first = _first_half(x, cos, sin, seen, parts)
        y, second = _second_half(middle, parts)
        ctx.seen, ctx.parts = seen, parts
        flat = [tensor for kept in (first, second) for tensor in _flat(kept)]
        # What `parts` holds as well is kept once more for autograd, which notices where it was changed meanwhile.
        frozen = [layer.weight for layer in parts.linear] + [norm.weight for norm in parts.norms]
        ctx.save_for_backward(*trained, *frozen, x, middle, cos, sin, *flat)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        parts: Parts = ctx.parts
        known = 3 * len(parts.linear) + len(parts.norms)
        x, middle, cos, sin, *rest = ctx.saved_tensors[known:]
        first, second = _restored(rest[:-_SECOND], 3), _restored(rest[-_SECOND:], 2)
        dmiddle, of_second = _second_half_back(dy, middle, second, parts)
        dx, of_first = _first_half_back(dmiddle, x, first, cos, sin, ctx.seen, parts, of_input=ctx.needs_input_grad[0])
        return dx, None, None, None, None, *of_first, *of_second


# Tensors of a second half, flat; a first half has the sums of its segments besides.
_SECOND = 7


def _flat(kept: _Kept) -> list[Tensor | None]:
    return [kept.inverse, kept.h, kept.thin, *kept.before, kept.inner, kept.inner_thin, *kept.totals]


def _restored(flat: Sequence[Any], before: int) -> _Kept:
    inverse, h, thin, *rest = flat
    inner, inner_thin, *totals = rest[before:]
    return _Kept(inverse, h, thin, tuple(rest[:before]), inner, inner_thin, totals)
