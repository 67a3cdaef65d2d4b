"""On-policy policy gradients: advantages of a group of answers to one prompt, and what is minimised. Pure functions.

    P  prompts      G  answers per prompt      M  tokens of all answers
    A  advantage of an answer      ϱ_t = π(token_t) / π_old(token_t)      d_t = log π(token_t) - log ρ(token_t)

    L = Σ_t -min(ϱ_t A, clip(ϱ_t, 1 - ε_low, 1 + ε_high) A) + β K_t,  divided by tokens, sequences or a constant

Every answer here was written by the policy itself: at ϱ = 1 the gradient is -A ∇log π, whatever the loss's value is.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "KL",
    "Aggregate",
    "Scale",
    "answer_weights",
    "clipped_surrogate",
    "enumerated_return",
    "group_advantages",
    "kl_estimate",
    "kl_penalty",
    "leave_one_out",
    "soft_overlong",
]

Scale = Literal["group", "batch", "none"]
Aggregate = Literal["tokens", "sequences", "constant"]
KL = Literal["k1", "k2", "k3"]

_SMALL = 1e-4  # added to a standard deviation, as TRL does
_FAR = -30.0  # nats: e^-d overflows float32 at d = -88


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO (Ahmadian et al. 2024): A_i = r_i - mean of the other rewards of the group. Unbiased.

    Args:
        rewards: (P, G), G >= 2; NaN = could not be scored, left out of every mean.

    Returns:
        (P, G); 0 for what could not be scored, and where nobody else of the group was.
    """
    known = ~rewards.isnan()
    values = rewards.nan_to_num(0.0)
    others = known.sum(-1, keepdim=True) - known.to(rewards.dtype)
    # One reward after another: the sum of equal ones less one of them is not always their mean, bit for bit.
    centred = values - _mean(values, known)
    return torch.where(known & (others > 0), centred * (others + 1) / others.clamp_min(1), 0.0)


def group_advantages(rewards: Tensor, *, scale: Scale = "group") -> Tensor:
    """GRPO (Shao et al. 2024): A_i = (r_i - mean) / (std + 1e-4), std with G - 1 in the denominator.

    `scale: none` is Dr. GRPO's (Liu et al. 2025): the true gradient times (G - 1) / G. Dividing by a group's std is no
    multiple of it and weights prompts by 1 / std. `batch`: by the std of all rewards.

    Args:
        rewards: (P, G), G >= 2; NaN = could not be scored.
        scale: What is divided by.

    Returns:
        (P, G); exactly 0 where all rewards of a group are equal, and for what could not be scored.
    """
    known = ~rewards.isnan()
    values = rewards.nan_to_num(0.0)
    centred = torch.where(known, values - _mean(values, known), 0.0)
    if scale == "none":
        return centred
    spread = _std(values, known) if scale == "group" else _std(values.reshape(1, -1), known.reshape(1, -1))
    return centred / (spread + _SMALL)


def _mean(values: Tensor, known: Tensor) -> Tensor:
    """(P, 1) mean of the known; of equal values exactly that value."""
    count = known.sum(-1, keepdim=True).clamp_min(1)
    first = values.gather(-1, known.to(torch.int8).argmax(-1, keepdim=True))
    return first + torch.where(known, values - first, 0.0).sum(-1, keepdim=True) / count


def _std(values: Tensor, known: Tensor) -> Tensor:
    squares = torch.where(known, (values - _mean(values, known)).square(), 0.0).sum(-1, keepdim=True)
    return (squares / (known.sum(-1, keepdim=True) - 1).clamp_min(1)).sqrt()


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Tensor, Tensor]:
    """-min(ϱ A, clip(ϱ, 1 - ε_low, 1 + ε_high) A) (Schulman et al. 2017, eq. 7; ε_high > ε_low: DAPO's clip-higher).

    Args:
        log_ratio: log ϱ, any shape.
        advantage: A, of the same shape; no gradient flows into it.
        clip_low: ε_low.
        clip_high: ε_high.

    Returns:
        (loss, whether the clipped term was taken and has no gradient), of that shape.
    """
    ratio, advantage = log_ratio.exp(), advantage.detach()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    outside = ((ratio > 1 + clip_high) & (advantage > 0)) | ((ratio < 1 - clip_low) & (advantage < 0))
    return -torch.minimum(ratio * advantage, clipped * advantage), outside.detach()


def kl_estimate(log_p: Tensor, reference: Tensor, *, kind: KL) -> Tensor:
    """Schulman's estimators of KL(π ‖ ρ) from tokens drawn from π: k1 = d, k2 = d²/2, k3 = e^-d - 1 + d.

    All three have the same mean in value (k2 nearly), NOT in gradient: E∇k1 = 0, E∇k2 = ∇KL(π ‖ ρ) and
    E∇k3 = ∇KL(ρ ‖ π), the other direction. `kl_penalty` puts that right.

    Args:
        log_p: (M,) log π of the tokens.
        reference: (M,) log ρ of the tokens.
        kind: Which.
    """
    d = (log_p - reference.detach()).clamp_min(_FAR)
    if kind == "k1":
        return d
    return 0.5 * d.square() if kind == "k2" else (-d).exp() - 1 + d


def kl_penalty(log_p: Tensor, reference: Tensor, log_ratio: Tensor, *, kind: KL, corrected: bool) -> Tensor:
    """(M,) what β multiplies in the loss.

    Args:
        log_p: (M,) log π.
        reference: (M,) log ρ.
        log_ratio: (M,) log ϱ = log π - log π_old; its gradient is what corrects.
        kind: Which estimator.
        corrected: Multiply by ϱ (TRL's `use_bias_correction_kl`): E∇(ϱ k3) = ∇KL(π ‖ ρ).
    """
    estimate = kl_estimate(log_p, reference, kind=kind)
    return log_ratio.exp() * estimate if corrected else estimate


def answer_weights(lengths: Tensor, *, aggregate: Aggregate, longest: int) -> Tensor:
    """What each token of an answer counts, before the division by the step's number of units.

    Args:
        lengths: (S,) tokens of each answer.
        aggregate: `tokens`: every token alike, the unit is the token (DAPO). `sequences`: the mean of an answer, the
            unit is the answer (GRPO as published: short right answers count more). `constant`: as if every answer had
            `longest` tokens, the unit is the answer (Dr. GRPO).
        longest: Most new tokens of an answer.

    Returns:
        (S,).
    """
    if aggregate == "tokens":
        return torch.ones_like(lengths, dtype=torch.float32)
    if aggregate == "sequences":
        return 1 / lengths.clamp_min(1).float()
    return torch.full_like(lengths, 1 / longest, dtype=torch.float32)


def enumerated_return(label_log_likelihood: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """J = Σ_k π(k) r_k with π the softmax over the labels' log-likelihoods: no sampling, no noise.

    ∂J/∂ℓ_k = π(k) (r_k - J).

    Args:
        label_log_likelihood: (P, K) ℓ_k.
        rewards: (P, K).

    Returns:
        ((P,) J, (P, K) π).
    """
    policy = label_log_likelihood.softmax(-1)
    return (policy * rewards).sum(-1), policy


def soft_overlong(tokens: int, *, longest: int, cushion: int) -> float:
    """DAPO's length penalty (Yu et al. 2025, eq. 13): 0 up to L - C, down to -1 at L, -1 beyond."""
    if tokens <= longest - cushion:
        return 0.0
    return -1.0 if tokens > longest else (longest - cushion - tokens) / cushion
