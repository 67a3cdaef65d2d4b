"""DualGPM (Liang and Li 2023): which input directions earlier domains use, with an energy threshold. Pure functions.

A memory holds an orthonormal basis of either the directions that are in use (few of them) or of those that are free
(few of those): whichever is smaller. Energy is the share of sum ||x||²: eigenvalues of the covariance C = sum x xᵀ.
(The authors' ViT code squares these eigenvalues again; that keeps fewer directions at the same threshold.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Memory",
    "directions",
    "energy_threshold",
    "project",
    "project_flops",
    "remember",
    "remember_flops",
    "without",
]


# Sine of the angle below which a direction counts as lying in a subspace, for bases in float32.
_OVERLAP = 1e-5


@dataclass(frozen=True, slots=True)
class Memory:
    """Directions of the input of one layer.

    Args:
        basis: (in, k) orthonormal columns; k may be 0.
        free: What the basis spans: `False`: what is in use, to be removed from an input ("remove"). `True`: what is
            free, all that is to be retained ("retain").
    """

    basis: Tensor
    free: bool

    @property
    def used(self) -> int:
        """Number of directions in use."""
        size, k = self.basis.shape
        return size - k if self.free else k


def energy_threshold(domain: int, domains: int, *, first: float, last: float) -> float:
    """ε_t = first + (last - first) t / T, for the t-th of T domains, t from 1."""
    return first + (last - first) * domain / domains


def project(matrix: Tensor, memory: Memory | None) -> Tensor:
    """The part of each column of (in, n) that lies in the free directions; all of it without a memory."""
    if memory is None:
        return matrix
    basis = memory.basis.to(matrix.dtype)
    inside = basis @ (basis.T @ matrix)
    return inside if memory.free else matrix - inside


def project_flops(matrix: Tensor, memory: Memory) -> int:
    """Of `project`, for a matrix of any shape with as many numbers."""
    return 4 * matrix.numel() * memory.basis.shape[1]


def remember_flops(before: Memory | None, after: Memory) -> int:
    """Of the products in `remember`, its eigendecomposition aside."""
    size, kept = len(after.basis), len(after.basis) - after.used
    free = size - (before.used if before else 0)
    return 2 * size * free * (size + free) + (0 if after is before else 2 * size * free * kept)


def without(memory: Memory, frozen: Sequence[Tensor]) -> Memory:
    """A memory for matrices that have no part in some directions F already, such that they keep none.

    One projection onto the intersection: M's part outside of F is made orthonormal, so that what is removed from a
    matrix outside of F lies outside of F. (Projecting by M itself would put a part back into F.)

    Args:
        memory: M, what is in use, or its complement.
        frozen: Each a bool mask (in,) of input features or orthonormal columns (in, k).
    """
    for part in frozen:
        mask = part.dtype == torch.bool
        basis = memory.basis.double()
        outside = (part[:, None] if mask else part).to(basis.dtype)
        inside = basis * outside if mask else outside @ (outside.T @ basis)
        if memory.free:
            # Combinations of the free directions that have no part in F.
            _, size, axes = torch.linalg.svd(inside, full_matrices=True)
            basis = basis @ axes[int((size > _OVERLAP).sum()) :].T
        else:
            left, size, _ = torch.linalg.svd(basis - inside, full_matrices=False)
            basis = left[:, size > _OVERLAP]
        if mask:
            basis = torch.where(part[:, None], 0.0, basis)  # exactly, as nothing of a frozen feature may move
        memory = Memory(basis.to(memory.basis.dtype), memory.free)
    return memory


def directions(covariance: Tensor, memory: Memory | None, *, rank: int) -> Tensor:
    """The top left singular vectors of the projected covariance: where new inputs are large and nothing is in use.

    Args:
        covariance: (in, in).
        memory: Of earlier domains, or `None`.
        rank: r.

    Returns:
        (r, in) orthonormal rows inside the free directions; rows of zeros where fewer than r are free.
    """
    projected = project(covariance.double(), memory)
    # Left singular vectors are eigenvectors of the Gram matrix; double precision makes up for the squares.
    _, vectors = torch.linalg.eigh(projected @ projected.T)
    found = project(vectors[:, -rank:].flip(1), memory)
    # Where nothing is free any more an eigenvector is arbitrary, and the projection leaves next to nothing of it.
    inside = found[:, found.norm(dim=0) > 0.5]
    # Equal eigenvalues (a covariance of low rank has many zeros) leave vectors that the projection may tilt.
    q, r = torch.linalg.qr(inside)
    length = r.diagonal()
    rows = (q * length.sign())[:, length.abs() > 0.5].T
    missing = max(0, rank - len(rows))
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]).to(covariance.dtype)


def remember(memory: Memory | None, covariance: Tensor, *, threshold: float) -> Memory:
    """Take the inputs of a domain in, so that at least the share `threshold` of their energy is in directions in use.

    Args:
        memory: Of earlier domains, or `None`.
        covariance: (in, in) of the inputs after the domain.
        threshold: ε, 0 to 1.

    Returns:
        A memory with at least as many directions in use; its basis is never wider than in / 2 (the switch).
    """
    c = covariance.double()
    size, total = len(c), float(c.trace())
    free = _free_basis(memory, size).to(c)
    # The free directions in the order of how much of this domain's energy they hold, least first.
    energy, axes = torch.linalg.eigh(free.T @ c @ free)
    left = energy.clamp_min(0).cumsum(0)
    # The margin is for rounding: 1 - 0.8 is not 0.2.
    keep = int((left <= (1 - threshold + 1e-12) * total).sum()) if total > 0 else len(left)
    if keep == free.shape[1] and memory is not None:
        return memory
    still_free = free @ axes[:, :keep]
    is_free = keep <= size - keep
    basis = still_free if is_free else _complement(still_free)
    return Memory(basis.to(covariance.dtype), is_free)


def _free_basis(memory: Memory | None, size: int) -> Tensor:
    if memory is None:
        return torch.eye(size, dtype=torch.float64)
    return memory.basis.double() if memory.free else _complement(memory.basis.double())


def _complement(basis: Tensor) -> Tensor:
    """(in, k) orthonormal -> (in, in - k) orthonormal, spanning the rest."""
    size, k = basis.shape
    if k == 0:
        return torch.eye(size, dtype=basis.dtype, device=basis.device)
    rest: Tensor = torch.linalg.qr(basis, mode="complete").Q[:, k:]
    return rest
