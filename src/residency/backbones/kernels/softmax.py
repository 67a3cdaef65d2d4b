"""Attention written out: with soft caps and sinks, which torch's fused kernels do not have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["How", "softmax_attention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How a layer attends.

    Args:
        scale: Of the logits; `None` = 1 / sqrt(d).
        dropout: Probability on the attention weights.
        window: Size of a sliding window in tokens, or `None`.
        softcap: Logits are squeezed into (-softcap, softcap); `None` = not.
        sinks: (H,) logit of a key that is always seen and holds nothing; `None` = there is none.
    """

    scale: float | None = None
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's fused kernels compute it."""
        return self.softcap is None and self.sinks is None


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: How) -> Tensor:
    """Attention written out, with what the fused kernels do not have.

        w = softmax_j(cap tanh(q k_j s / cap), sink),    y = Σ_j w_j v_j;  the sink takes weight and gives nothing

    (Soft caps: Gemma 2, arXiv 2408.00118, section 2; sinks: gpt-oss, one logit per head.)

    Args:
        query: (B, H, N, d).
        key: (B, K, L, d); K divides H.
        value: (B, K, L, d).
        mask: Broadcasts to (B, H, N, L): True where a key is seen, or what is added to the logits; `None` = all seen.
        how: See `How`.

    Returns:
        (B, H, N, d).
    """
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if how.scale is None else how.scale
    logits = query @ key.transpose(2, 3) * scale
    if how.softcap is not None:
        logits = (logits / how.softcap).tanh() * how.softcap
    if mask is not None:
        lowest = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask
    if how.sinks is not None:
        sinks = how.sinks.reshape(1, -1, 1, 1).to(logits.dtype).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    weights = logits.float().softmax(-1).to(value.dtype)[..., : key.shape[2]]
    return F.dropout(weights, how.dropout, training=how.dropout > 0) @ value
