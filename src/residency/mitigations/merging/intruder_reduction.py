"""Scaling down intruder dimensions (Shuttleworth et al. 2024, "LoRA vs full fine-tuning: an illusion of equivalence").

What `peft.tuners.lora.intruders.reduce_intruder_dimension` computes, as a function of two matrices. PEFT's own
function adds a second adapter to the model, reads quantised codes as weights, and mixes up the factors where a layer
stores its weight transposed (embeddings, GPT-2); the tests compare both where it applies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.tensors import Products, Term, terms_of
from residency.core.types import Capability, Tensors
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.merging.states import unless_first

__all__ = ["IntruderReduction", "intruders", "reduce_intruders"]


def intruders(base: Tensor, update: Tensor, *, top_k: int, threshold: float) -> tuple[Tensor, Tensor]:
    """The directions that rank among the largest of W + ΔW and are not like any of W.

    Args:
        base: W, (out, in).
        update: ΔW, (out, in).
        top_k: How many of the largest singular directions are looked at.
        threshold: An intruder's largest |cosine| with a left singular vector of W is below it.

    Returns:
        u s, (out, n), and vᵀ, (n, in), of the n intruders: their product is their part of W + ΔW.
    """
    known = torch.linalg.svd(base.float(), full_matrices=False).U
    u, s, vh = torch.linalg.svd(base.float() + update.float(), full_matrices=False)
    likeness = (u[:, :top_k].T @ known).abs().amax(1)
    found = torch.nonzero(likeness < threshold).flatten()
    return u[:, found] * s[found], vh[found]


def reduce_intruders(base: Tensor, update: Tensor, *, top_k: int, threshold: float, scale: float) -> Tensor:
    """ΔW + (scale - 1) Σ s u vᵀ over the intruders: their part of W + ΔW is multiplied by `scale`."""
    left, right = intruders(base, update, top_k=top_k, threshold=threshold)
    return update + (scale - 1) * (left @ right)


class IntruderReduction(Mitigation):
    """Multiply the intruder dimensions of every adapted weight by a factor after a stage, at the adapter's rank.

    Two decompositions per adapted weight and stage; nothing in the step, no state.

    Args:
        scale: Factor on the intruders (PEFT's `mitigation_lambda`); 1 = off, 0 removes them.
        top_k: How many of the largest singular directions of a weight are looked at.
        threshold: An intruder's largest |cosine| with a singular vector of the pretrained weight is below it.
        first: After the first stage too.
    """

    holds: ClassVar[frozenset[Guarantee]] = frozenset({"end of stage"})
    requires: frozenset[Capability] = frozenset({"averageable", "low_rank"})
    alternative: ClassVar[str] = "configs/mitigation/wise_ft.yaml, or configs/adapter/lora.yaml"

    def __init__(self, *, scale: float = 0.75, top_k: int = 10, threshold: float = 0.5, first: bool = True) -> None:
        super().__init__()
        if not 0 <= scale <= 1 or top_k < 1 or not 0 <= threshold <= 1:
            raise UserError(
                f"IntruderReduction with scale={scale}, top_k={top_k}, threshold={threshold}",
                why="scale and threshold are in [0, 1], top_k is at least 1",
                fix="PEFT's values are scale: 0.75, top_k: 10, threshold: 0.5",
            )
        self.scale = scale
        self.top_k = top_k
        self.threshold = threshold
        self.first = first
        self.uses_base = scale < 1

    def transform_weights(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Reduce the intruders of every weight under a product; everything else stays."""
        if self.scale == 1 or not unless_first(module, first=self.first):
            return after
        base = module.base_weights

        def found(name: str) -> tuple[Tensor, Tensor]:
            # PiSSA and the like move a part of the pretrained weight into the first update.
            frozen = module.adapter.adapted_weight(module.model, name).float() + base[name]
            shift = after[name] - base[name]
            return intruders(frozen, shift, top_k=self.top_k, threshold=self.threshold)

        def compute(name: str) -> Tensor:
            if terms_of(base, name) is None:
                return after[name]
            left, right = found(name)
            return after[name] + (self.scale - 1) * (left @ right)

        def terms(name: str) -> Sequence[Term] | None:
            known = terms_of(after, name)
            return None if known is None else [*known, (self.scale - 1, *found(name))]

        return Products(after, compute, terms)

    def changes_weights(self, index: int) -> bool:
        """Not at scale 1, and after the first stage only if asked for."""
        return self.scale != 1 and (index > 0 or self.first)
