"""What the tokens of a packed row see, as one comparison per pair of tokens: the mask of FlexAttention.

Rows are packed depth first, so all that may follow token k lies in one run behind it. Query q sees key k iff

    k <= q < end[k]            end[k] = the place behind the last token that may follow k

which is causality, the border between segments and the ancestry of branches at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from residency.core.types import Segment, segment_tokens

__all__ = ["attend_flex", "block_mask", "follows_until", "places"]


def follows_until(segments: Sequence[Segment]) -> Tensor:
    """(N,) int32: of every token of a row the place behind the last token that may follow it."""
    ends: list[int] = []
    for segment in segments:
        _walk_ends(segment, ends)
    return torch.tensor(ends, dtype=torch.int32)


def _walk_ends(segment: Segment, ends: list[int]) -> None:
    run, branches = segment_tokens(segment[:1]), segment[1:]
    ends += [len(ends) + segment_tokens(segment)] * run
    for branch in branches:
        _walk_ends((branch,) if isinstance(branch, int) else branch, ends)


def places(segments: Sequence[Segment]) -> Tensor:
    """(N,) int32: how many tokens of its own segment each token follows."""
    found: list[int] = []
    for segment in segments:
        _walk_places(segment, 0, found)
    return torch.tensor(found, dtype=torch.int32)


def _walk_places(segment: Segment, before: int, found: list[int]) -> None:
    run, branches = segment_tokens(segment[:1]), segment[1:]
    found += range(before, before + run)
    for branch in branches:
        _walk_places((branch,) if isinstance(branch, int) else branch, before + run, found)


def block_mask(segments: Sequence[Segment], *, window: int | None = None, device: torch.device | str) -> BlockMask:
    """The mask of a packed row, once for all layers with the same window.

    Args:
        segments: See `Batch.segments`; N tokens.
        window: Keys further back than this are hidden.
        device: Where attention computes.
    """
    end, place = follows_until(segments).to(device), places(segments).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query < end[key])
        return seen if window is None else seen & (place[query] - place[key] < window)

    return create_block_mask(sees, None, None, len(end), len(end), device=str(device))


def attend_flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scale: float | None = None) -> Tensor:
    """Attention of a packed row; on a CPU without gradients only (torch 2.13 refuses them there).

    Args:
        query: (1, H, N, d).
        key: (1, K, N, d); K divides H (grouped-query attention).
        value: (1, K, N, d).
        mask: Of `block_mask`.
        scale: Of the logits; 1 / sqrt(d) by default.

    Returns:
        (1, H, N, d).
    """
    out = flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    assert isinstance(out, Tensor)
    return out
