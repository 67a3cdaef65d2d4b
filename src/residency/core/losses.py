"""Losses of single tokens. Pure functions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["IMPOSSIBLE", "token_nll"]

IMPOSSIBLE = -1e4
"""The logit of what cannot be chosen: its probability is exactly 0, and differences stay finite."""


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each supervised token.

    Args:
        logits: (M, V).
        targets: (M,).

    Returns:
        (M,) in nats, float32.
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")
