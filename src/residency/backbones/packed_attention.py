"""Attention per segment of a packed row, through transformers' attention interface.

Works for every architecture that calls the interface: the segments arrive as a keyword of the model's forward, and so
does the memory of `residency.backbones.generation`. On CUDA one kernel (FlexAttention) attends to a whole row, where it
is found exact on the shape at hand; elsewhere each segment is attended to by itself. Without these keywords (padded
batches) it is transformers' own scaled-dot-product attention. Soft caps (Gemma 2) and sinks (gpt-oss) are part of it;
any other keyword that is not known is refused, so that a model that needs it is left to its own attention
(`residency.backbones.exactness`).
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

from residency.backbones.kernels.flex import attend_row
from residency.backbones.kernels.segments import segment_mask
from residency.backbones.kernels.softmax import How, softmax_attention
from residency.core.types import Segment, segment_tokens

__all__ = ["NAME", "How", "Memory", "attend_segments", "register", "segment_mask"]

NAME = "residency_packed"

Segments = tuple[Segment, ...]

# A tree of branches and a plain text, 160 tokens: what one kernel for a row is tried on.
_TRIED: Segments = ((60, (30, 10, 12), 8), (40,))
_TOLERANCE, _LOOSE = {torch.float32: 5e-3, torch.float64: 1e-6}, 3e-2  # TF32 has 10 bits, bfloat16 7

# What transformers hands on to attention and what changes nothing in it: the model has used it already, or it tells
# flash attention what `segments` tells here.
_IDLE = {"position_ids", "cache_position", "position_embeddings", "past_key_values", "logits_to_keep", "use_cache"}
_IDLE |= {"output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "layer_idx"}


class Memory:
    """Keys and values of several texts, layer by layer, while they are continued one token at a time.

    Args:
        lengths: Tokens of each text, B of them.
        room: Tokens that may be added to each.
        device: Of the model.
    """

    def __init__(self, lengths: Sequence[int], *, room: int, device: Any) -> None:
        self.lengths = torch.tensor(lengths, device=device)
        self._room = room
        self._part = range(0)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reads(self, part: range) -> None:
        """The next packed row holds these texts."""
        self._part = part

    def advance(self) -> None:
        """The next pass adds one token to every text."""
        self.lengths = self.lengths + 1

    def keep(self, places: Sequence[int]) -> None:
        """Forget all other texts."""
        at = torch.tensor(places, device=self.lengths.device)
        self.lengths = self.lengths[at]
        self._layers = {layer: (k[at], v[at]) for layer, (k, v) in self._layers.items()}

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep keys and values, (1, K, N, d), of the packed row that is being read."""
        if layer not in self._layers:
            shape = (len(self.lengths), key.shape[1], int(self.lengths.max()) + self._room, key.shape[3])
            self._layers[layer] = key.new_zeros(shape), value.new_zeros((*shape[:3], value.shape[3]))
        sizes = self.lengths[self._part.start : self._part.stop].tolist()
        for kept, new in zip(self._layers[layer], (key, value), strict=True):
            for text, tokens in zip(self._part, new[0].split(sizes, 1), strict=True):
                kept[text, :, : tokens.shape[1]] = tokens

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        """Add one token to every text and let it see its text.

        Args:
            layer: Number of the layer.
            query: (B, H, 1, d).
            key: (B, K, 1, d).
            value: (B, K, 1, d).
            how: See `How`.

        Returns:
            (B, H, 1, d).
        """
        count, last = len(self.lengths), self.lengths - 1
        keys, values = self._layers[layer]
        rows = torch.arange(count, device=last.device)
        keys[rows, :, last], values[rows, :, last] = key[:, :, 0], value[:, :, 0]
        width = int(self.lengths.max())
        back = last[:, None] - torch.arange(width, device=last.device)
        seen = back >= 0 if how.window is None else (back >= 0) & (back < how.window)
        if not how.is_plain:
            return softmax_attention(query, keys[:, :, :width], values[:, :, :width], seen[:, None, None, :], how)
        # The query heads of one key head become queries of their own, so that keys need not be repeated.
        grouped = query.view(count, keys.shape[1], -1, query.shape[3])
        mask = seen[:, None, None, :].expand(count, 1, grouped.shape[2], width)
        out = F.scaled_dot_product_attention(grouped, keys[:, :, :width], values[:, :, :width], mask, scale=how.scale)
        return out.view(count, query.shape[1], 1, -1)


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
    memory: Memory | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    _refuse_unknown(others)
    layer: Any = getattr(module, "layer_idx", None)
    how = How(scale=scaling, dropout=dropout, window=sliding_window, softcap=softcap, sinks=s_aux)
    if segments is None and memory is None:
        return _padded(module, query, key, value, attention_mask, how, is_causal=is_causal)
    if is_causal is False or not getattr(module, "is_causal", True):
        raise NotImplementedError("attention to later tokens in packed rows")
    if memory is not None and segments is None:
        out = memory.attend(layer, query, key, value, how)
    else:
        assert segments is not None
        if memory is not None:
            memory.store(layer, key, value)
        one = _runs_flex(how, query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3])
        if one:
            out = attend_row(query, key, value, segments, window=how.window, scale=how.scale)
        else:
            out = attend_segments(query, key, value, segments, how)
    return out.transpose(1, 2).contiguous(), None


def _runs_flex(how: How, device: torch.device, dtype: torch.dtype, heads: int, keys: int, width: int) -> bool:
    """Whether one kernel attends to all segments: on CUDA, where a try gives what the segments give one by one."""
    return device.type == "cuda" and how.is_plain and not how.dropout and _tried_flex(device, dtype, heads, keys, width)


@lru_cache(maxsize=64)
def _tried_flex(device: torch.device, dtype: torch.dtype, heads: int, keys: int, width: int) -> bool:
    """Once per shape and process: a small tree over the border of two blocks, with a window and without."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        shapes = ((1, n, 160, width) for n in (heads, keys, keys))
        query, key, value = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
        try:
            return all(_agrees(query, key, value, window) for window in (None, 20))
        except Exception:  # no compiler, or a shape that it has no kernel for: many unrelated types
            return False


def _agrees(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> bool:
    found = attend_row(query, key, value, _TRIED, window=window, scale=None)
    wanted = attend_segments(query, key, value, _TRIED, How(window=window))
    return bool((found - wanted).abs().max() <= _TOLERANCE.get(query.dtype, _LOOSE) * wanted.abs().max())


def _refuse_unknown(others: dict[str, Any]) -> None:
    unknown = sorted(name for name, value in others.items() if name not in _IDLE and value is not None)
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")


def _padded(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    how: How,
    *,
    is_causal: bool | None,
) -> tuple[Tensor, None]:
    if how.is_plain:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=how.scale,
            dropout=how.dropout,
            is_causal=is_causal,
        )
        return plain
    mask = attention_mask
    if mask is None and is_causal is not False and getattr(module, "is_causal", True) and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    out = softmax_attention(query, key, value, mask, how)
    return out.transpose(1, 2).contiguous(), None


def attend_segments(query: Tensor, key: Tensor, value: Tensor, segments: Segments, how: How) -> Tensor:
    """Causal attention inside each segment, none between segments.

    Args:
        query: (1, H, N, d).
        key: (1, K, N, d); K divides H (grouped-query attention).
        value: (1, K, N, d).
        segments: See `Batch.segments`; the lengths sum to N.
        how: See `How`.

    Returns:
        (1, H, N, d).
    """
    sizes = [segment_tokens(segment) for segment in segments]
    # Token by token, as the linear layers before and after have it: parts are split off and joined as whole blocks.
    wide = [_per_head(tensor.transpose(1, 2), query.shape[1]).split(sizes, 1) for tensor in (query, key, value)]
    out = []
    for segment, q, k, v in zip(segments, *wide, strict=True):
        plain = how.is_plain and len(segment) == 1 and (how.window is None or q.shape[1] <= how.window)
        mask = None if plain else segment_mask(segment, how.window).to(q.device)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if how.is_plain:
            seen = F.scaled_dot_product_attention(
                q, k, v, mask, dropout_p=how.dropout, is_causal=plain, scale=how.scale
            )
        else:
            seen = softmax_attention(q, k, v, mask, how)
        out.append(seen.transpose(1, 2))
    return torch.cat(out, 1).transpose(1, 2)


def _per_head(tensor: Tensor, heads: int) -> Tensor:
    """(1, N, K, d) -> (1, N, H, d): keys and values repeated for the query heads that share them."""
    repeats = heads // tensor.shape[2]
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, 2)
