"""Attention per segment of a packed row, through transformers' attention interface.

Works for every architecture that calls the interface: the segments arrive as a keyword of the model's forward. Without
that keyword (padded batches, generation) it is transformers' own scaled-dot-product attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from residency.types import Segment, segment_tokens

__all__ = ["NAME", "register"]

NAME = "residency_packed"

Segments = tuple[Segment, ...]


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers (idempotent)."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    # A packed row comes without a mask. So does a generation without padding; it needs one only where more keys
    # than queries lie in the cache, as behind a trained prefix.
    if attention_mask is None and q_length == kv_length:
        return None
    mask: Tensor | None = sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)
    return mask


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if segments is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return plain
    out = attend_segments(query, key, value, segments, scale=scaling, dropout=dropout, window=sliding_window)
    return out.transpose(1, 2).contiguous(), None


def attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """Causal attention inside each segment, none between segments.

    Args:
        query: (1, H, N, d).
        key: (1, K, N, d); K divides H (grouped-query attention).
        value: (1, K, N, d).
        segments: See `Batch.segments`; the lengths sum to N.
        scale: Of the logits; `None` = 1 / sqrt(d).
        dropout: Probability on the attention weights.
        window: Size of a sliding window in tokens, or `None`.

    Returns:
        (1, H, N, d).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    sizes = [segment_tokens(segment) for segment in segments]
    parts = zip(segments, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    out = []
    for segment, q, k, v in parts:
        plain = len(segment) == 1 and (window is None or q.shape[2] <= window)
        mask = None if plain else segment_mask(segment, window).to(q.device)
        out.append(F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=plain, scale=scale))
    return torch.cat(out, 2)


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
