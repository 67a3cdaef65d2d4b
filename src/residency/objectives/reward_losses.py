"""Losses of a reward model. Pure functions of the rewards of P pairs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["bradley_terry", "centring"]


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log σ(r_c - r_r - m): the likelihood that the preferred answer wins (Bradley and Terry 1952).

    Args:
        chosen: (P,) rewards.
        rejected: (P,) rewards.
        margin: m >= 0, by how much it should win (Touvron et al. 2023, eq. 2).

    Returns:
        (P,) in nats; log 2 for equal rewards without margin. A constant added to all rewards changes nothing.
    """
    return -F.logsigmoid(chosen - rejected - margin)


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(P,) (r_c + r_r)², which keeps the scale of rewards from drifting (Eisenstein et al. 2023, eq. 2)."""
    return (chosen + rejected).square()
