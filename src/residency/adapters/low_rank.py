"""Low-rank factors of a matrix: pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["low_rank_factors"]


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
    length = (a_norm or 1.0) / min(rank, smallest) ** 0.5
    # A rank above the matrix's own dimensions leaves directions over; they stay empty.
    spare = max(0, rank - smallest)
    return F.pad(u[:, :rank] * (s[:rank] / length), (0, spare)), F.pad(vh[:rank] * length, (0, 0, 0, spare))
