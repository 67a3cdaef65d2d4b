"""Low-rank factors of a matrix, and of a sum of products: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from residency.core.tensors import Term, wide

__all__ = ["low_rank_factors", "product_factors"]


def low_rank_factors(matrix: Tensor, *, rank: int, a_norm: float) -> tuple[Tensor, Tensor]:
    """The best rank-r factorisation B A of a matrix, with a chosen scale of A.

    A factorisation has a free gauge (B G, G^-1 A). It is fixed so that A has orthogonal rows of equal length and its
    former norm: the step that an optimizer makes in B A afterwards keeps its size.

    Args:
        matrix: (out, in).
        rank: r.
        a_norm: Frobenius norm that A shall have; 0 gives 1.

    Returns:
        B (out, r) and A (r, in).
    """
    smallest = min(matrix.shape)
    wide = min(2 * rank + 8, smallest)
    if smallest <= 4 * rank:
        u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    else:
        # Randomised range finding is exact up to rounding for rank <= `wide`, as a mean of two rank-r updates is
        # (Halko et al. 2011, algorithm 4.4). Its draw is fixed, so that the result is a function of the matrix.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix.float(), q=wide, niter=4)
            vh = v.T
    return _in_gauge(u, s, vh, rank=rank, a_norm=a_norm)


def product_factors(terms: Sequence[Term], *, rank: int, a_norm: float) -> tuple[Tensor, Tensor, float, float] | None:
    """The best rank-r factorisation B A of a sum of products, without forming it.

    With [c1 L1, c2 L2, ...] = Q_L T_L and [R1; R2; ...]ᵀ = Q_R T_R the singular values are those of the small
    T_L T_Rᵀ. A single product of the right rank is taken as it is, in its own gauge: exact.

    Args:
        terms: (c, L, R) with L (out, r_i) and R (r_i, in).
        rank: r.
        a_norm: Frobenius norm that A shall have if there are several products; 0 gives 1.

    Returns:
        B (out, r), A (r, in), the squared norm of what is lost, and that of the sum; `None` if the sum is zero.
    """
    parts = [(c * wide(left), wide(right)) for c, left, right in terms if c and left.any() and right.any()]
    if not parts:
        return None
    if len(parts) == 1 and parts[0][0].shape[1] == rank:
        b, a = (factor.float() for factor in parts[0])
        return b, a, 0.0, float(((b.T @ b) * (a @ a.T)).sum())
    q_left, t_left = torch.linalg.qr(torch.cat([left for left, _ in parts], 1))
    q_right, t_right = torch.linalg.qr(torch.cat([right for _, right in parts]).T)
    u, s, vh = torch.linalg.svd(t_left @ t_right.T, full_matrices=False)
    b, a = (f.float() for f in _in_gauge(q_left @ u, s, vh @ q_right.T, rank=rank, a_norm=a_norm))
    return b, a, float(s[rank:].square().sum()), float(s.square().sum())


def _in_gauge(u: Tensor, s: Tensor, vh: Tensor, *, rank: int, a_norm: float) -> tuple[Tensor, Tensor]:
    length = (a_norm or 1.0) / min(rank, len(s)) ** 0.5
    # A rank above that of the matrix leaves directions over; they stay empty.
    spare = max(0, rank - len(s))
    return F.pad(u[:, :rank] * (s[:rank] / length), (0, spare)), F.pad(vh[:rank] * length, (0, 0, 0, spare))
