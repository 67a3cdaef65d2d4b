"""Losses and weights of single supervised tokens. Pure functions; whoever sums them divides by the number of tokens.

    L = Σ_t w_t nll_t / N,     nll_t = -log p_t,  w_t without gradient,  N supervised tokens of the step (not Σ w)

The forgetting literature reweights supervised fine-tuning; which weight is whose:

    DFT   p_t                                           Wu et al. 2025, arXiv:2508.05629
    EAFT  (H_t / ln k)^α, H_t over the k likeliest      Diao et al. 2026, arXiv:2601.02151
    TALR  max(exp(-nll_t / τ), floor)                   Lin et al. 2025, arXiv:2509.20758
    FLOW  exp(-m_i / τ), m_i the row's mean nll         Sanyal et al. 2025, arXiv:2502.02797
    STM   1 where the start gives p_t >= 1/θ, else 0    Wu et al. 2025, arXiv:2501.14315

M = supervised tokens, V = vocabulary, R = rows; everything in nats and float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from residency.core.losses import IMPOSSIBLE

__all__ = [
    "effective_share",
    "entropy_weights",
    "flow_weights",
    "kl_to_reference",
    "low_perplexity_mask",
    "probability_weights",
    "smoothed_nll",
    "talr_weights",
    "token_entropy",
]


def probability_weights(nll: Tensor) -> Tensor:
    """DFT: (M,) p_t from (M,) -log p_t, without gradient.

    The gradient of the weighted loss is p_t times that of the likelihood: tokens that the model does not expect are
    hardly learnt.
    """
    return (-nll.detach()).exp()


def entropy_weights(logits: Tensor, *, k: int = 20, alpha: float = 1.0) -> Tensor:
    """EAFT: how undecided the model is among its k likeliest tokens, relative to a uniform choice.

    Args:
        logits: (M, V).
        k: Tokens that count, renormalised among themselves; of a smaller vocabulary all, at least 2.
        alpha: Exponent; 0 = all weights 1.

    Returns:
        (M,) in [0, 1], without gradient. The paper's code divides by 3.0, which is ln 20 = 2.996 rounded.
    """
    k = min(k, logits.shape[-1])
    top = logits.detach().float().topk(k, dim=-1).values.log_softmax(-1)
    return (-(top.exp() * top).sum(-1) / math.log(k)).clamp(0.0, 1.0).pow(alpha)


def token_entropy(logits: Tensor) -> Tensor:
    """(M,) entropy of the next token, in nats, from (M, V) logits."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def talr_weights(nll: Tensor, *, tau: float, floor: float = 0.01) -> Tensor:
    """TALR: the weights that minimise Σ w nll + τ Σ w log w, not renormalised, never below a floor.

    Args:
        nll: (M,) in nats.
        tau: Temperature in nats; infinite = all weights 1.
        floor: Smallest weight. The paper released no code: its normalisation is unverified.
    """
    return (-nll.detach() / tau).exp().clamp_min(floor)


def flow_weights(row_means: Tensor, *, tau: float | None = None) -> Tensor:
    """FLOW: rows that the start already explains keep their weight, others are learnt less.

    Args:
        row_means: (R,) mean nll of each row of the training set under the model at the start.
        tau: Temperature in nats; `None` = the median of the means (that of an even number is the middle of the two).

    Returns:
        (R,) in (0, 1].
    """
    if tau is None:
        tau = float(torch.quantile(row_means.double(), 0.5))
    if tau <= 0 or math.isinf(tau):
        return torch.ones_like(row_means)
    return (-row_means / tau).exp()


def low_perplexity_mask(start_nll: Tensor, *, threshold: float = 2.5) -> Tensor:
    """STM: (M,) 1.0 for tokens whose perplexity exp(nll) under the start is at most θ, else 0.0."""
    return (start_nll <= math.log(threshold)).to(start_nll.dtype)


def smoothed_nll(logits: Tensor, targets: Tensor, *, smoothing: float) -> Tensor:
    """(1 - ε) nll_t + ε mean over the vocabulary of -log p, as `torch.nn.functional.cross_entropy` smooths.

    What a model rules out (`IMPOSSIBLE`: labels that do not compete) is no part of the vocabulary.

    Args:
        logits: (M, V).
        targets: (M,).
        smoothing: ε in [0, 1).

    Returns:
        (M,) in nats.
    """
    log_p = logits.float().log_softmax(-1)
    nll = -log_p.gather(-1, targets[:, None]).squeeze(-1)
    possible = logits > IMPOSSIBLE / 2
    mean = log_p.masked_fill(~possible, 0.0).sum(-1) / possible.sum(-1)
    return (1 - smoothing) * nll - smoothing * mean


def kl_to_reference(logits: Tensor, reference: Tensor, *, direction: str = "forward") -> Tensor:
    """Divergence of each next-token distribution from the reference's, which gets no gradient.

    Args:
        logits: (M, V) of the model.
        reference: (M, V) of the reference.
        direction: `forward` = KL(reference ‖ model), which covers all that the reference says; `reverse` = KL(model ‖
            reference).

    Returns:
        (M,) >= 0 in nats.
    """
    ours, theirs = logits.float().log_softmax(-1), reference.detach().float().log_softmax(-1)
    if direction == "reverse":
        return (ours.exp() * (ours - theirs)).sum(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1)


def effective_share(weights: Tensor) -> Tensor:
    """(Σ w)² / (N Σ w²) in (0, 1]: which share of the tokens would give as much with equal weights; 0 if all are 0."""
    return weights.sum().square() / (weights.numel() * weights.square().sum()).clamp_min(1e-30)
