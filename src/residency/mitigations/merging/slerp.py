"""SLERP (Shoemake 1985): mix two task vectors along the arc between them, so that their length is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.tensors import Products, Term, terms_of, wide
from residency.core.types import Capability, Tensors
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.merging.states import unless_first

__all__ = ["SLERP", "slerp", "slerp_merge", "slerp_weights"]

_PARALLEL = 0.9995


def slerp_weights(a: Tensor, b: Tensor, *, alpha: float) -> tuple[float, float]:
    """The factors (p, q) of p a + q b: sin((1 - α) Ω) / sin Ω and sin(α Ω) / sin Ω, Ω the angle between a and b.

    Args:
        a: Any shape.
        b: Same shape.
        alpha: α in [0, 1].

    Returns:
        (1 - α, α) where the angle says nothing: |cos Ω| > 0.9995, or a vector of length 0.
    """
    lengths = float(wide(a).norm()) * float(wide(b).norm())
    cosine = float((wide(a) * wide(b)).sum()) / lengths if lengths else 1.0
    if abs(cosine) > _PARALLEL:
        return 1 - alpha, alpha
    angle = torch.tensor(cosine, dtype=torch.float64).arccos()
    first, second = (torch.sin(share * angle) / torch.sin(angle) for share in (1 - alpha, alpha))
    return float(first), float(second)


def slerp(a: Tensor, b: Tensor, *, alpha: float) -> Tensor:
    """From a (α = 0) to b (α = 1), both the very tensors; of unit vectors every point is a unit vector."""
    if alpha in (0, 1):
        return b if alpha else a
    p, q = slerp_weights(a, b, alpha=alpha)
    return p * a + q * b


def slerp_merge(base: Tensors, before: Tensors, after: Tensors, *, alpha: float) -> Tensors:
    """θ_0 + slerp(θ_a - θ_0, θ_b - θ_0), each named tensor on an arc of its own; what is a product stays one.

    Args:
        base: θ_0.
        before: θ_a; returned at α = 0.
        after: θ_b, same names and shapes; returned at α = 1.
        alpha: α in [0, 1].
    """
    if alpha in (0, 1):
        return after if alpha else before

    def weights(name: str) -> tuple[float, float]:
        start = base[name]
        return slerp_weights(before[name] - start, after[name] - start, alpha=alpha)

    def compute(name: str) -> Tensor:
        start, new = base[name], after[name]
        return start + slerp(before[name] - start, new - start, alpha=alpha) if new.is_floating_point() else new

    def terms(name: str) -> Sequence[Term] | None:
        known = [terms_of(tensors, name) for tensors in (base, before, after)]
        p, q = weights(name) if None not in known else (0.0, 0.0)
        found: list[Term] = []
        for factor, products in zip((1 - p - q, p, q), known, strict=True):
            if products is None:
                return None
            found += [(factor * c, left, right) for c, left, right in products]
        return found

    return Products(after, compute, terms)


class SLERP(Mitigation):
    """θ_t ← θ_0 + slerp(θ_{t-1} - θ_0, θ_t - θ_0; α): stage mixing that keeps the length of the task vector.

    Of task vectors, because the whole weights before and after a stage are all but parallel, where SLERP is the
    straight line. Per named tensor.

    Args:
        alpha: Share of the stage just trained, in [0, 1]. 1 = off, 0 = undo the stage (both exact).
        first: After the first stage too, where the vector before is zero and the arc a straight line.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"end of stage"})
    requires: frozenset[Capability] = frozenset({"averageable"})
    alternative: ClassVar[str] = (
        "configs/mitigation/replay.yaml, or an adapter whose states can be averaged (lora, full)"
    )

    def __init__(self, *, alpha: float = 0.5, first: bool = False) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(
                f"SLERP with alpha={alpha}",
                why="alpha is the share of the new stage, between 0 (keep the old weights) and 1 (no mixing)",
                fix="give a value in [0, 1], for example alpha: 0.5",
            )
        self.alpha = alpha
        self.first = first
        self.uses_base = 0 < alpha < 1

    def transform_weights(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Mix, except after the first stage."""
        if not unless_first(module, first=self.first):
            return after
        return slerp_merge(module.base_weights, before, after, alpha=self.alpha)

    def changes_weights(self, index: int) -> bool:
        """Not at alpha 1, and after the first stage only if asked for."""
        return self.alpha != 1 and (index > 0 or self.first)
