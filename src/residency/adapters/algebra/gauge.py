"""The gauge of two factors: of all (B, A) with one product, the pair nearest to a given one. A pure function."""

from __future__ import annotations

import torch
from torch import Tensor

from residency.core.tensors import wide

__all__ = ["nearest_gauge"]

_RANK = 1e-7  # singular values below this share of the largest are rounding errors of factors in float32
_SINGULAR = 1e-12  # the same of a Gram matrix, whose eigenvalues are squares


def nearest_gauge(b: Tensor, a: Tensor, *, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """B and A with the product of the given ones, as near to other factors as an orthogonal change of basis gets.

    What remembers coordinates (EWC, SI, MAS, OGD, the bases of GPM) remembers one of the infinitely many pairs with a
    product. Factors from an SVD of that product lie up to 140 % of their norm away from it where the product itself has
    hardly moved; these do not.

        M = N V with orthonormal rows of V,   K = (A₀ A₀ᵀ)^½,   X Σ Yᵀ = svd(K A₀ Vᵀ),   Q = X Yᵀ
        A = K Q V,   B = N Qᵀ K⁻¹

    Among all A = K Q V with orthogonal Q this one minimises ‖A - A₀‖ (orthogonal Procrustes, Schönemann 1966); A Aᵀ is
    A₀ A₀ᵀ, so that an optimizer's step in B A keeps its size.

    Args:
        b: (out, r).
        a: (r, in); the product M = B A may have a lower rank.
        like: B₀ and A₀, same shapes. Where A₀ has dependent rows, K is a multiple of the identity with its norm.

    Returns:
        B and A in the dtype of `like`; computed in float64, by decompositions of r x r and of tall matrices.
    """
    rank, start = len(a), wide(like[1])
    n, v = _orthonormal_rows(wide(b), wide(a), start)
    root, inverse = _gram_root(start, directions=int(v.any(1).sum()))
    x, _, yh = torch.linalg.svd(root @ start @ v.T)
    q = x @ yh
    assert q.shape == (rank, rank)
    return (n @ q.T @ inverse).to(like[0].dtype), (root @ q @ v).to(like[1].dtype)


def _orthonormal_rows(b: Tensor, a: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """N (out, r) and V (r, in) with N V = B A and orthonormal rows of V; directions that the product does not have are
    those of `start`, with empty columns of N.
    """
    q, t = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(b @ t.T, full_matrices=False)
    kept = int((s > _RANK * s[0]).sum()) if len(s) and s[0] > 0 else 0
    v, n = vh[:kept] @ q.T, u[:, :kept] * s[:kept]
    if (spare := len(a) - kept) > 0:
        rest = start - (start @ v.T) @ v
        _, size, w = torch.linalg.svd(rest, full_matrices=False)
        # What start does not have either stays empty: Q is orthogonal whatever V is, so the product holds.
        w = torch.where((size > _RANK * start.norm())[:, None], w, torch.zeros_like(w))[:spare]
        v = torch.cat([v, w, v.new_zeros(spare - len(w), v.shape[1])])
        n = torch.cat([n, n.new_zeros(len(n), spare)], 1)
    return n, v


def _gram_root(a: Tensor, *, directions: int) -> tuple[Tensor, Tensor]:
    """K = (A Aᵀ)^½ and its inverse; of dependent rows a multiple of the identity that gives as many directions together
    the norm of A.
    """
    values, vectors = torch.linalg.eigh(a @ a.T)
    if values[0] <= _SINGULAR * values[-1]:
        scale = (float(a.norm()) or 1.0) / max(1, directions) ** 0.5
        eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
        return scale * eye, eye / scale
    root = values.sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
