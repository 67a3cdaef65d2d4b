"""Mixing the weights after a stage with those before it (Wortsman et al. 2022 for the end points base and tuned)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.tensors import Products, Term, terms_of
from residency.core.types import Capability, Tensors
from residency.mitigations.base import Guarantee, Into, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.merging.states import check_into

__all__ = ["WeightMixing", "mix"]


def mix(before: Tensors, after: Tensors, *, alpha: float) -> Tensors:
    """(1 - α) before + α after, name by name, when read.

    Args:
        before: Weights before the stage.
        after: Weights after it, same names and shapes.
        alpha: α in [0, 1]; at 0 and 1 the very object `before` or `after` is returned.
    """
    if alpha == 0:
        return before
    if alpha == 1:
        return after

    def compute(name: str) -> Tensor:
        new = after[name]
        # Integer buffers have no mean; torch.lerp is exact where nothing has moved.
        return torch.lerp(before[name], new, alpha) if new.is_floating_point() else new

    def terms(name: str) -> Sequence[Term] | None:
        old, new = terms_of(before, name), terms_of(after, name)
        if old is None or new is None:
            return None
        kept = [((1 - alpha) * c, left, right) for c, left, right in old]
        return kept + [(alpha * c, left, right) for c, left, right in new]

    return Products(after, compute, terms)


class WeightMixing(Mitigation):
    """Stage mixing: θ_t ← (1 - α) θ_{t-1} + α θ_t after every stage, in the adapter's averaging space.

    For LoRA this is the space of the updates B A, brought back to the adapter's rank.

    Args:
        alpha: Weight of the stage just trained, in [0, 1]. 1 = off, 0 = undo the stage (both exact).
        first: Mix after the first stage too (with the pretrained model); off by default: the first domain has nothing
            to forget but the base.
        into: `train`: training goes on from the merged weights; `serve`: they are scored and exported, and training
            goes on unmerged.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"end of stage"})
    requires: frozenset[Capability] = frozenset({"averageable"})
    alternative: ClassVar[str] = (
        "configs/mitigation/replay.yaml, or an adapter whose states can be averaged (lora, full)"
    )

    def __init__(self, *, alpha: float = 0.5, first: bool = False, into: Into = "train") -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(
                f"WeightMixing with alpha={alpha}",
                why="alpha is the weight of the new stage, between 0 (keep the old weights) and 1 (no mixing)",
                fix="give a value in [0, 1], for example alpha: 0.5",
            )
        self.alpha = alpha
        self.first = first
        self.into = check_into(into, owner="WeightMixing")

    def transform_weights(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Mix, except after the first stage."""
        if module.stage.index == 0 and not self.first:
            return after
        return mix(before, after, alpha=self.alpha)

    def changes_weights(self, index: int) -> bool:
        """Not at alpha 1, and after the first stage only if asked for."""
        return self.alpha != 1 and (index > 0 or self.first)
