"""How far a model has moved: weights (E17), representations (E18), output distributions (E14), backbone (E16).

Pure functions of tensors. An update ΔW (out, in) may be given as a product L R with L (out, r) and R (r, in), as
LoRA's s B A is; then no (out, in) matrix is formed: a QR decomposition of both factors leaves an (r, r) matrix with
the same singular values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "WeightDrift",
    "dense_drift",
    "functional_drift",
    "kl_from_top",
    "kl_tokens",
    "linear_cka",
    "low_rank_cosine",
    "low_rank_drift",
    "low_rank_inner",
    "low_rank_singular_values",
    "parametric_drift",
    "spectral_norm",
    "top_log_probabilities",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightDrift:
    """Size and shape of one update.

    Args:
        frobenius: ‖ΔW‖_F.
        spectral: ‖ΔW‖₂, the largest singular value.
        stable_rank: ‖ΔW‖_F² / ‖ΔW‖₂², between 1 and the rank; NaN for no update.
    """

    frobenius: float
    spectral: float
    stable_rank: float


def _drift(frobenius: float, spectral: float) -> WeightDrift:
    rank = (frobenius / spectral) ** 2 if spectral > 0 else math.nan
    return WeightDrift(frobenius=frobenius, spectral=spectral, stable_rank=rank)


# -- weights ----------------------------------------------------------------------------------------------------------


def low_rank_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of L R, largest first, without forming it: those of R_L R_Rᵀ, from L = Q_L R_L, Rᵀ = Q_R R_R.

    Args:
        left: (out, r).
        right: (r, in).

    Returns:
        (min(out, r, in),) float64.
    """
    r_left = torch.linalg.qr(left.double(), mode="r").R
    r_right = torch.linalg.qr(right.double().T, mode="r").R
    values: Tensor = torch.linalg.svdvals(r_left @ r_right.T)
    return values


def low_rank_inner(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """⟨L₁R₁, L₂R₂⟩ = tr((L₁ᵀL₂)(R₂R₁ᵀ)); with itself ‖LR‖_F², which is LoRA's s² tr((BᵀB)(AAᵀ))."""
    (left_a, right_a), (left_b, right_b) = ((left.double(), right.double()) for left, right in (a, b))
    return float(((left_a.T @ left_b) * (right_a @ right_b.T)).sum())


def low_rank_drift(left: Tensor, right: Tensor) -> WeightDrift:
    """Norms of the update L R."""
    values = low_rank_singular_values(left, right)
    return _drift(float(values.norm()), float(values[0]) if values.numel() else 0.0)


def low_rank_cosine(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Cosine of two updates as long vectors; NaN if one is 0."""
    size = math.sqrt(max(0.0, low_rank_inner(a, a)) * max(0.0, low_rank_inner(b, b)))
    return low_rank_inner(a, b) / size if size > 0 else math.nan


def dense_drift(update: Tensor) -> WeightDrift:
    """Norms of an update that is there as a whole; of a vector both norms are its length."""
    matrix = update.detach().double()
    if matrix.dim() != 2:
        size = float(matrix.norm())
        return _drift(size, size)
    return _drift(float(matrix.norm()), spectral_norm(matrix))


def spectral_norm(matrix: Tensor, *, exact_up_to: int = 1024) -> float:
    """‖W‖₂, the largest singular value.

    From the eigenvalues of the smaller Gram matrix, exact up to half of the digits, which is a fraction of the price of
    a decomposition; for large matrices by subspace iteration from a fixed start, a lower bound within about 1 %.

    Args:
        matrix: (out, in).
        exact_up_to: Largest smaller side of the exact way.
    """
    w = matrix.detach().double()
    w = w if w.shape[0] <= w.shape[1] else w.T
    if w.shape[0] <= exact_up_to:
        return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(w @ w.T)[-1]))) if w.numel() else 0.0
    start = torch.Generator().manual_seed(0)
    basis = torch.randn(w.shape[0], 16, generator=start, dtype=torch.float64).to(w.device)
    for _ in range(20):
        basis = torch.linalg.qr(w @ (w.T @ basis)).Q
    return float(torch.linalg.svdvals(w.T @ basis)[0])


# -- backbone ---------------------------------------------------------------------------------------------------------


def parametric_drift(now: Tensor, before: Tensor) -> tuple[float, float]:
    """(‖θ_T - θ_0‖², ‖θ_0‖²) of one tensor. Sum both over the backbone: 100 √(Σ first / Σ second) is E16 (b), in
    percent; a frozen backbone gives exactly 0.
    """
    first, second = now.detach().double(), before.detach().double()
    return float((first - second).square().sum()), float(second.square().sum())


def functional_drift(*, now: float, before: float) -> float:
    """E16 (a): 100 (NLL now - NLL before) / NLL before, in percent, of the adapter saved after domain j.

    Args:
        now: Mean NLL of domain j with its saved adapter on the backbone of the last domain.
        before: The same on the backbone with which the adapter was trained. Equal, bit for bit, if the backbone is
            frozen; then the drift is exactly 0.
    """
    if before <= 0:
        return math.nan
    return 100.0 * (now - before) / before


# -- representations --------------------------------------------------------------------------------------------------


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Similarity of two representations of the same tokens, debiased (Kornblith et al. 2019; Song et al. 2012).

    CKA = HSIC(K, L)/√(HSIC(K, K) HSIC(L, L)) of the linear kernels K = XXᵀ, L = YYᵀ with the unbiased estimator of
    HSIC. The plain estimator goes to 1 for unrelated data when there are fewer tokens than dimensions. 1 = equal up
    to rotation and scale, about 0 = unrelated; the drift is 1 - CKA.

    Args:
        x: (n, d), n >= 4; the spec asks for n >= 1000.
        y: (n, e), the same n tokens.

    Returns:
        NaN if a representation is constant.
    """
    if x.shape[0] != y.shape[0] or x.shape[0] < 4:
        raise ValueError(f"{tuple(x.shape)} and {tuple(y.shape)}: give the same tokens to both, at least 4")
    k, gram = (_kernel(h) for h in (x, y))
    own = _unbiased_hsic(k, k) * _unbiased_hsic(gram, gram)
    return _unbiased_hsic(k, gram) / math.sqrt(own) if own > 0 else math.nan


def _kernel(h: Tensor) -> Tensor:
    """(n, n) linear kernel without its diagonal, of centred and scaled rows (for rounding; CKA does not change)."""
    centred = h.detach().double()
    centred = centred - centred.mean(0)
    scale = centred.norm() / math.sqrt(centred.shape[0])
    kernel = centred @ centred.T / (scale**2 if scale > 0 else 1.0)
    return kernel.fill_diagonal_(0.0)


def _unbiased_hsic(k: Tensor, m: Tensor) -> float:
    """HSIC₁ of two kernels with empty diagonals (Song et al. 2012, equation 5)."""
    n = k.shape[0]
    value = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
    return float(value) / (n * (n - 3))


# -- output distributions ---------------------------------------------------------------------------------------------


def kl_tokens(reference: Tensor, logits: Tensor) -> Tensor:
    """Forward KL(π_0‖π_t) = Σ_v π_0(v) log(π_0(v)/π_t(v)) of every token, in nats.

    Args:
        reference: (M, V) logits of the base.
        logits: (M, V) logits now.

    Returns:
        (M,) float64, not negative.
    """
    log_p, log_q = (torch.log_softmax(z.detach().double(), -1) for z in (reference, logits))
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0)


def top_log_probabilities(logits: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """What has to be kept of a base distribution for `kl_from_top`: (M, k) token ids and (M, k) log-probabilities."""
    log_p = torch.log_softmax(logits.detach().double(), -1)
    values, ids = log_p.topk(min(k, log_p.shape[-1]), -1)
    return ids, values


def kl_from_top(ids: Tensor, log_p: Tensor, logits: Tensor) -> Tensor:
    """KL over the base's k likeliest tokens and one bucket for all others: a lower bound of `kl_tokens`; k = V: equal.

    Args:
        ids: (M, k) from `top_log_probabilities` of the base.
        log_p: (M, k) likewise.
        logits: (M, V) logits now.

    Returns:
        (M,) nats, float64.
    """
    log_q = torch.log_softmax(logits.detach().double(), -1)
    kept = log_q.gather(-1, ids)
    terms = (log_p.exp() * (log_p - kept)).sum(-1)
    if ids.shape[-1] < log_q.shape[-1]:
        # 1 - Σ loses all digits where the rest is tiny; a floor keeps the logarithm finite.
        p, q = ((1.0 - value.exp().sum(-1)).clamp_min(1e-12) for value in (log_p, kept))
        terms = terms + p * (p.log() - q.log())
    return terms.clamp_min(0.0)
