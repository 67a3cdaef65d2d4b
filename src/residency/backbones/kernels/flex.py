"""What the tokens of a packed row see, as one comparison per pair of tokens: the mask of FlexAttention.

Rows are packed depth first, so all that may follow token k lies in one run behind it. Query q sees key k iff

    k <= q < end[k]            end[k] = the place behind the last token that may follow k

which is causality, the border between segments and the ancestry of branches at once. The blocks of 128 x 128 pairs
that hold nothing, or nothing but seen pairs, are found from the ends themselves, on the device: no mask of all pairs is
made and nothing waits for the host.

On CUDA the kernel is compiled; rows are filled up to a few lengths, so that few kernels are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from residency.core.types import Segment, segment_tokens

__all__ = ["attend_flex", "attend_row", "block_mask", "filled", "follows_until", "places"]

_BLOCK = 128
_KERNELS = 64  # lengths, windows and head sizes of one process; beyond them torch would compute all pairs, in silence


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


def filled(tokens: int) -> int:
    """The length up to which a row of so many tokens is filled: 1, 1.5, 2, 3, 4, 6, 8, ... blocks of 128 (at least
    one, in whole blocks), so that at most a third is padding beyond a block and few kernels are compiled.
    """
    blocks = -(-tokens // _BLOCK)
    power = 1
    while power < blocks:
        power *= 2
    return _BLOCK * (3 * power // 4 if power >= 4 and blocks <= 3 * power // 4 else power)


def block_mask(
    segments: Sequence[Segment], *, window: int | None = None, device: torch.device | str, length: int | None = None
) -> BlockMask:
    """The mask of a packed row, once for all layers with the same window.

    Args:
        segments: See `Batch.segments`; N tokens.
        window: Keys further back than this are hidden.
        device: Where attention computes.
        length: Tokens with the padding behind the row, each of which sees itself; N by default.
    """
    end, place = follows_until(segments), places(segments)
    tokens, length = len(end), length or len(end)
    blocks = -(-length // _BLOCK)
    # Of whole blocks: the kernel reads the ends of all its keys.
    more = torch.arange(tokens, blocks * _BLOCK, dtype=torch.int32)
    end, place = _sent(torch.cat([end, more + 1]), device), _sent(torch.cat([place, more]), device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query < end[key])
        return seen if window is None else seen & (place[query] - place[key] < window)

    some, every = _kinds(end.view(blocks, _BLOCK), whole=window is None)
    options: dict[str, Any] = {"BLOCK_SIZE": _BLOCK, "mask_mod": sees, "seq_lengths": (length, length)}
    return BlockMask.from_kv_blocks(*_listed(some & ~every), *_listed(every), **options)


def _sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On the device, without waiting for it."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _kinds(end: Tensor, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Which blocks (row of queries, column of keys) hold a pair that is seen, and which hold no other.

    Args:
        end: (blocks, 128) of the keys.
        whole: Whether blocks may be seen as a whole: not where a window hides far keys.
    """
    index = torch.arange(len(end), device=end.device)
    first = index[:, None] * _BLOCK
    below = index[None, :] < index[:, None]
    some = (below & (first < end.amax(1)[None, :])) | torch.diag(torch.ones_like(index, dtype=torch.bool))
    every = below & (first + _BLOCK <= end.amin(1)[None, :])
    return some, every if whole else torch.zeros_like(every)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, rows) numbers of blocks per row, and (1, 1, rows, columns) their columns in order, the others behind."""
    order = torch.argsort(blocks.to(torch.int8), dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


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
    kernel: Any = _compiled() if query.device.type == "cuda" else flex_attention
    out: Tensor = kernel(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return out


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, _KERNELS)
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return compiled


@lru_cache(maxsize=8)
def _mask_of(segments: tuple[Segment, ...], window: int | None, device: torch.device) -> BlockMask:
    tokens = sum(map(segment_tokens, segments))
    return block_mask(segments, window=window, device=device, length=filled(tokens))


def attend_row(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], *, window: int | None, scale: float | None
) -> Tensor:
    """Attention inside each segment of a packed row, by one kernel.

    Args:
        query: (1, H, N, d).
        key: (1, K, N, d); K divides H.
        value: (1, K, N, d).
        segments: See `Batch.segments`; the lengths sum to N.
        window: Keys further back than this are hidden.
        scale: Of the logits; 1 / sqrt(d) by default.

    Returns:
        (1, H, N, d).
    """
    tokens = query.shape[2]
    mask = _mask_of(segments, window, query.device)
    more = mask.seq_lengths[0] - tokens
    query, key, value = (F.pad(t, (0, 0, 0, more)) if more else t for t in (query, key, value))
    return attend_flex(query, key, value, mask, scale=scale)[:, :, :tokens]
