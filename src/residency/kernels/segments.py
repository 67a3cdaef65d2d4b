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

from residency.types import Segment, segment_tokens

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


@lru_cache(maxsize=64)
def segments_seen(segments: tuple[Segment, ...]) -> Seen:
    """The same for every layer of a pass."""
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
        k: (N, H, d).
        v: (N, H, d).
        seen: Of the row.
        scale: Of the logits.

    Returns:
        (N, H, d) and, per segment, the logarithms of the sums of the softmax.
    """
    found = [
        _ops._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, mask is None, attn_mask=mask, scale=scale)
        for *parts, mask in zip(*_cut(seen, q, k, v), seen.masks, strict=True)
    ]
    return _joined([out for out, _ in found]), [total for _, total in found]


def attend_back(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, totals: Sequence[Tensor], seen: Seen, scale: float
) -> list[Tensor]:
    """dq, dk and dv, (N, H, d) each, of `attend`."""
    found = [
        _ops._scaled_dot_product_flash_attention_for_cpu_backward(
            *parts, total, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        for *parts, total, mask in zip(*_cut(seen, dout, q, k, v, out), totals, seen.masks, strict=True)
    ]
    return [_joined(parts) for parts in zip(*found, strict=True)]


def _cut(seen: Seen, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Per tensor, (N, H, d), its segments as (1, H, n, d)."""
    return [tensor.transpose(0, 1).unsqueeze(0).split_with_sizes(seen.sizes, 2) for tensor in tensors]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.transpose(1, 2) for part in parts], 1)[0]


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
