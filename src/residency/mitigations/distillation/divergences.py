"""Divergences between the next-token distributions of a teacher and a student. Pure functions.

Shapes: M positions, V tokens of the vocabulary, k tokens that are kept of the teacher.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from residency.backbones.kernels.autograd import apply

__all__ = ["buckets", "distillation_loss", "generalised_jsd", "top_log_probs"]

# An impossible token: exp is exactly 0, and differences stay finite.
_NEVER = -1e4


def _log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """At least in float32: half precision loses small differences between two distributions."""
    return F.log_softmax((logits if logits.dtype == torch.float64 else logits.float()) / temperature, dim=-1)


def top_log_probs(logits: Tensor, *, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The k most likely tokens of every position.

    Args:
        logits: (M, V).
        k: At least 1; more than V is V.
        temperature: τ, the logits' divisor.

    Returns:
        (M, k) log-probabilities at that temperature, float32, and (M, k) their tokens, int64, the likeliest first.
    """
    log_p = _log_probs(logits, temperature)
    top, ids = log_p.topk(min(k, logits.shape[-1]), dim=-1)
    return top, ids


class _Distillation(torch.autograd.Function):
    # Its own backward: the gradient τ (p_s - p_t) / M is known, and autograd's version of it keeps four more (M, V).
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teacher: Tensor, ids: Tensor | None, temperature: float, count: float
    ) -> Tensor:
        log_s = _log_probs(logits, temperature)
        if ids is None:
            kl, difference = _full(log_s, _log_probs(teacher, temperature))
        else:
            kl, difference = _top(log_s, teacher, ids)
        ctx.save_for_backward(difference)
        ctx.scale, ctx.dtype = temperature / count, logits.dtype
        return temperature**2 * kl.sum() / count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (difference,) = ctx.saved_tensors
        return (difference * (grad_outputs[0] * ctx.scale)).to(ctx.dtype), None, None, None, None


def _full(log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) KL(t || s) and its gradient (M, V) with respect to the student's tempered logits."""
    p_t = log_t.exp()
    kl = torch.where(p_t > 0, p_t * (log_t - log_s), 0.0).sum(-1)
    return kl, log_s.exp().sub_(p_t)


def _top(log_s: Tensor, top_log_t: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same over k tokens and one bucket with all others.

    With P, Q the mass of that bucket under teacher and student, the gradient is p_s - p_t at the k tokens and
    p_s (1 - P / Q) at the others.
    """
    tiny = torch.finfo(log_s.dtype).tiny
    p_s, top_t = log_s.exp(), top_log_t.exp()
    top_s = p_s.gather(-1, ids)
    # Summed, not 1 minus the rest: the quotient P / Q must not be one of rounding errors.
    tail_s = p_s.scatter_(-1, ids, 0.0).sum(-1).clamp_min(tiny)
    tail_t = (1 - top_t.sum(-1)).clamp_min(0.0)
    if ids.shape[-1] == log_s.shape[-1]:
        # Nothing is left: what rounding leaves of 1, against a mass of nothing, would be a divergence of its own.
        tail_t = torch.zeros_like(tail_t)
    kl = (top_t * (top_log_t - log_s.gather(-1, ids))).sum(-1)
    kl = kl + torch.xlogy(tail_t, tail_t) - torch.xlogy(tail_t, tail_s)
    return kl, p_s.mul_((1 - tail_t / tail_s).unsqueeze(-1)).scatter_(-1, ids, top_s - top_t)


def distillation_loss(
    logits: Tensor, teacher: Tensor, *, temperature: float, ids: Tensor | None = None, count: float | None = None
) -> Tensor:
    """τ² KL(p_t || p_s), the mean over positions, p = softmax(logits / τ) (Hinton et al. 2015; Li and Hoiem 2016).

    Args:
        logits: (M, V) of the student.
        teacher: (M, V) logits of the teacher, or, with `ids`, (M, k) its log-probabilities at temperature τ.
        temperature: τ > 0. τ² keeps the size of the gradient as τ grows.
        ids: (M, k) tokens of `teacher`. All other tokens are one bucket, so that both distributions sum to 1; this
            never exceeds the divergence of the whole distributions and equals it at k = V.
        count: What the sum over positions is divided by (`Batch.normaliser`); `None` = M, the mean.

    Returns:
        Scalar in nats, float32. Its gradient is τ (p_s - p_t) / count with respect to the logits, none for the teacher.
    """
    divisor = len(logits) if count is None else count
    loss: Tensor = apply(_Distillation, logits, teacher, ids, temperature, divisor)
    return loss


def buckets(logits: Tensor, ids: Tensor | None) -> Tensor:
    """Log-probabilities of chosen tokens and of all others together.

    Args:
        logits: (M, V).
        ids: (M, k), or `None` = every token by itself.

    Returns:
        (M, k + 1), (M, V) without `ids` or if k is V; the exponentials of a row sum to 1.
    """
    log_p = _log_probs(logits).clamp_min(_NEVER)
    if ids is None:
        return log_p
    top = log_p.gather(-1, ids)
    if ids.shape[-1] == log_p.shape[-1]:
        return top
    rest = log_p.scatter(-1, ids, _NEVER).logsumexp(-1, keepdim=True)
    return torch.cat([top, rest], dim=-1)


def generalised_jsd(teacher: Tensor, student: Tensor, *, alpha: float) -> Tensor:
    """α KL(t || m) + (1 - α) KL(s || m) with m = α t + (1 - α) s (Agarwal et al. 2024, eq. 1).

    Args:
        teacher: (M, K) log-probabilities.
        student: (M, K), the same events.
        alpha: α in [0, 1]. The ends are defined as the divergences that the limits are proportional to:
            KL(t || s) at 0 and KL(s || t) at 1.

    Returns:
        (M,) in nats; exchanging teacher and student is the same as exchanging α and 1 - α.
    """
    if alpha == 0:
        return _kl(teacher, student)
    if alpha == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(alpha), student + math.log1p(-alpha))
    return alpha * _kl(teacher, mixture) + (1 - alpha) * _kl(student, mixture)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)
