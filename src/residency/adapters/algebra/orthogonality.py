"""The penalty of O-LoRA (Wang et al. 2023): rows of a new block orthogonal to those before. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from residency.core.errors import UserError

__all__ = ["Orthogonality", "overlap", "squared_cosine"]

Norm = Literal["l1", "l2sq"]


@dataclass(frozen=True, kw_only=True)
class Orthogonality:
    """How O-LoRA keeps a new block away from the old ones. All strengths at 0 is IncLoRA.

    Args:
        norm: `l1`: sum of |A_old A_newᵀ|, what the authors' released code does and their numbers come from. `l2sq`:
            sum of squares, equation 8 of the paper.
        strength: λ1, of the overlap; the authors used 0.5 for most orders and searched 0 to 5.
        shrinkage: λ2, of the norms (not squared) of the new block's A and B; 0 in most of their runs. It and a large λ1
            can shrink the new block until the penalty is 0 and nothing is learnt: watch `adapter/norm_a`.
    """

    norm: Norm = "l1"
    strength: float = 0.5
    shrinkage: float = 0.0

    def __post_init__(self) -> None:
        if self.strength < 0 or self.shrinkage < 0:
            raise UserError(
                f"model.adapter.penalty with strength {self.strength} and shrinkage {self.shrinkage}",
                why="a negative penalty would reward what it is to prevent",
                fix="give numbers >= 0; 0 switches a term off",
            )


def overlap(new: Tensor, old: Tensor, *, norm: Norm) -> Tensor:
    """The orthogonality term of one layer, a scalar.

    Args:
        new: A of the new block, (r, in).
        old: A of all earlier blocks, rows below each other, (r (t - 1), in).
        norm: See `Orthogonality`.
    """
    products = old @ new.T
    return products.abs().sum() if norm == "l1" else products.square().sum()


def squared_cosine(new: Tensor, old: Tensor) -> Tensor:
    """Mean squared cosine between the rows of two blocks: 0 = orthogonal, 1 / in = as random rows, 1 = parallel.

    Unlike the penalty it does not fall when the new block merely becomes small.

    Args:
        new: (r, in).
        old: (q, in).
    """
    rows = [x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) for x in (new, old)]
    cosines: Tensor = rows[1] @ rows[0].T
    return cosines.square().mean()
