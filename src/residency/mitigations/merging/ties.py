"""TIES-Merging (Yadav et al. 2023): trim task vectors, elect signs, average what agrees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.tensors import wide
from residency.core.types import Capability, Tensors
from residency.mitigations.base import Guarantee, Into, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.merging.states import (
    check_into,
    check_last,
    merged_vectors,
    stage_weights,
    state_bytes,
    unless_first,
)

__all__ = ["TIES", "ties", "ties_merge", "trim"]


def trim(vector: Tensor, *, density: float) -> Tensor:
    """Keep the ceil(density · n) entries of largest magnitude, zero the others.

    Args:
        vector: Any shape, n entries.
        density: Share that is kept, in (0, 1]; 1 returns the very tensor.
    """
    if density == 1:
        return vector
    flat = vector.flatten()
    kept = flat.abs().topk(math.ceil(density * flat.numel()), sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(vector)


def ties(vectors: Sequence[Tensor], *, density: float) -> Tensor:
    """Trim every vector; per entry elect the sign of the sum; the mean of the vectors that have it and are not zero.

    Args:
        vectors: At least one, equal shapes.
        density: Share of each vector that is kept, in (0, 1].

    Returns:
        0 where nothing is left or the sum is 0; equal vectors at density 1 give that vector, bit for bit.
    """
    trimmed = wide(torch.stack([trim(vector, density=density) for vector in vectors]))
    sign = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == sign) & (sign != 0)
    mean = (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)
    return mean.to(vectors[0].dtype)


def ties_merge(base: Tensors, tuned: Sequence[Tensors], *, density: float, strength: float) -> Tensors:
    """θ_0 + λ TIES(θ_1 - θ_0, ..., θ_n - θ_0), each named tensor trimmed by itself.

    Args:
        base: θ_0.
        tuned: θ_1 ... θ_n, same names and shapes, at least one.
        density: Share of each task vector that is kept, in (0, 1].
        strength: λ. At 0, and at 1 for a single state at density 1, the very object is returned.
    """
    if len(tuned) == 1 and density == strength == 1:
        return tuned[0]
    return merged_vectors(base, tuned, lambda name, vectors: ties(vectors, density=density), strength=strength)


class TIES(Mitigation):
    """θ_t ← θ_0 + λ TIES(τ_1, ..., τ_t) over the last stages, in the adapter's averaging space.

    For LoRA the vectors are the updates s B A, and the result, whose entries were chosen one by one, is brought back
    to the adapter's rank: what that loses is in the record as `truncation`.

    Args:
        density: Share of every task vector that is kept, in (0, 1].
        strength: λ >= 0.
        last: How many states take part, the newest included; null = all. 1 with density 1 and strength 1 = off.
        first: After the first stage too (then it is a trimmed τ_1).
        into: `train`: training goes on from the merged weights; `serve`: they are scored and exported, and training
            goes on unmerged.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"end of stage"})
    requires: frozenset[Capability] = frozenset({"averageable"})
    alternative: ClassVar[str] = (
        "configs/mitigation/replay.yaml, or an adapter whose states can be averaged (lora, full)"
    )

    def __init__(
        self,
        *,
        density: float = 0.2,
        strength: float = 1.0,
        last: int | None = None,
        first: bool = False,
        into: Into = "train",
    ) -> None:
        super().__init__()
        check_last(last, owner="TIES")
        if not (0 < density <= 1 and strength >= 0):
            raise UserError(
                f"TIES with density={density}, strength={strength}",
                why="the density is the share of entries that is kept, in (0, 1]; the strength is not negative",
                fix="the paper's values are density: 0.2 and strength: 1.0",
            )
        self.density = density
        self.strength = strength
        self.last = last
        self.first = first
        self.into = check_into(into, owner="TIES")
        self.uses_base = not self._off
        self.add_state("kept", {})

    @property
    def _off(self) -> bool:
        return self.density == self.strength == 1 and self.last == 1

    def transform_weights(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Merge, and remember the state for the next stages."""
        if self._off:
            return after
        tuned = stage_weights(self, module, after, last=self.last)
        if not unless_first(module, first=self.first):
            return after
        return ties_merge(module.base_weights, tuned, density=self.density, strength=self.strength)

    def grows_by(self, trainable: int) -> int:
        """A state per stage, unless only the last few are merged."""
        return 0 if self._off or self.last is not None else state_bytes(trainable)

    def changes_weights(self, index: int) -> bool:
        """Not when off, and after the first stage only if asked for."""
        return not self._off and (index > 0 or self.first)
