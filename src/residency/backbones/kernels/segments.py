"""Attention inside of each segment of a packed row, with its gradient written down.

The kernel is torch's own for the CPU, which `scaled_dot_product_attention` calls as well. Called by itself it gives the
sums of its softmax, with which a node that holds more than attention can run the backward kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from residency.core.types import Segment, segment_tokens

__all__ = ["Seen", "attend", "attend_back", "segment_mask", "segments_seen"]

_ops: Any = torch.ops.aten


class Seen(NamedTuple):
    """What the tokens of a packed row see.

    Attributes:
        sizes: Tokens of each segment.
        masks: Of each segment what is added to its logits, (n, n): 0 or -inf; `None` = causal.
    """

    sizes: list[int]
    masks: list[Tensor | None]


@lru_cache(maxsize=8)
def segments_seen(segments: tuple[Segment, ...]) -> Seen:
    """The same for every layer of a pass, of which there may be several at a time."""
    return Seen([segment_tokens(segment) for segment in segments], [_added(segment) for segment in segments])


def _added(segment: Segment) -> Tensor | None:
    if len(segment) == 1:
        return None
    seen = segment_mask(segment)
    return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float) -> tuple[Tensor, list[Tensor]]:
    """Attention per segment.

    Args:
        q: (N, H, d) float32 on the CPU, like k and v.
        k: (N, K, d); K divides H (grouped-query attention).
        v: (N, K, d).
        seen: Of the row.
        scale: Of the logits.

    Returns:
        (N, H, d) and, per segment, the logarithms of the sums of the softmax.
    """
    groups = k.shape[1]
    found = [
        _ops._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, mask is None, attn_mask=mask, scale=scale)
        for *parts, mask in zip(*_cut(seen, groups, q, k, v), seen.masks, strict=True)
    ]
    return _joined([out for out, _ in found]).view(q.shape), [total for _, total in found]


def attend_back(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, totals: Sequence[Tensor], seen: Seen, scale: float
) -> list[Tensor]:
    """dq, (N, H, d), dk and dv, (N, K, d) each, of `attend`."""
    groups = k.shape[1]
    found = [
        _ops._scaled_dot_product_flash_attention_for_cpu_backward(
            *parts, total, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        for *parts, total, mask in zip(*_cut(seen, groups, dout, q, k, v, out), totals, seen.masks, strict=True)
    ]
    dq, dk, dv = (_joined(parts) for parts in zip(*found, strict=True))
    return [dq.view(q.shape), dk.sum(2), dv.sum(2)]


def _cut(seen: Seen, groups: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Per tensor, (N, H or K, d), its segments as (K, H / K, n, d): keys are lent to the queries that share them."""
    shared = max(tensor.shape[1] for tensor in tensors) // groups
    wide = [tensor.unflatten(1, (groups, -1)).permute(1, 2, 0, 3) for tensor in tensors]
    return [tensor.expand(groups, shared, -1, -1).split_with_sizes(seen.sizes, 2) for tensor in wide]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """(N, K, H / K, d) of the segments."""
    return torch.cat([part.permute(2, 0, 1, 3) for part in parts])


@lru_cache(maxsize=256)
def segment_mask(segment: Segment, window: int | None = None) -> Tensor:
    """Which key (column) each query (row) of one segment may see: the tokens it follows, and itself.

    Args:
        segment: See `Segment`; n tokens.
        window: Keys further back than this are hidden.

    Returns:
        (n, n) bool.
    """
    n = segment_tokens(segment)
    seen = torch.zeros(n, n, dtype=torch.bool)
    position = torch.zeros(n, dtype=torch.long)
    _fill(seen, position, segment, 0, [])
    distance = position[:, None] - position[None, :]
    return seen if window is None else seen & (distance < window)


def _fill(seen: Tensor, position: Tensor, segment: Segment, start: int, before: Sequence[int]) -> None:
    """Write what the tokens of a segment see and where they stand.

    Args:
        seen: (n, n).
        position: (n,).
        segment: The part whose first token is `start`.
        start: Place in the row.
        before: Places of the tokens that all of the part's tokens follow.
    """
    length = segment_tokens(segment[:1])
    run = range(start, start + length)
    seen[start : start + length, list(before)] = True
    seen[start : start + length, start : start + length] = torch.ones(length, length, dtype=torch.bool).tril()
    position[start : start + length] = torch.arange(length) + len(before)
    start += length
    for branch in segment[1:]:
        part = (branch,) if isinstance(branch, int) else branch
        _fill(seen, position, part, start, [*before, *run])
        start += segment_tokens(part)
