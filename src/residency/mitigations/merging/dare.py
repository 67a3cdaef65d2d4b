"""DARE (Yu et al. 2024): drop entries of task vectors at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.randomness import generator, seed_of
from residency.core.types import Capability, Tensors
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.merging.states import check_last, merged_vectors, stage_weights, state_bytes, unless_first
from residency.mitigations.merging.task_arithmetic import task_arithmetic

__all__ = ["DARE", "dare", "dare_merge"]


def dare(vector: Tensor, *, drop: float, draw: torch.Generator) -> Tensor:
    """Zero every entry with probability p, multiply the others by 1 / (1 - p): the expectation is the vector.

    Args:
        vector: τ, any shape.
        drop: p in [0, 1); 0 returns the very tensor and draws nothing.
        draw: On the CPU, so that every device drops the same entries.
    """
    if drop == 0:
        return vector
    kept = torch.rand(vector.shape, generator=draw).to(vector.device) >= drop
    return vector * kept / (1 - drop)


def dare_merge(base: Tensors, tuned: Sequence[Tensors], *, drop: float, strength: float, seed: int) -> Tensors:
    """θ_0 + λ Σ DARE(θ_i - θ_0), name by name.

    Args:
        base: θ_0.
        tuned: θ_1 ... θ_n, same names and shapes, at least one.
        drop: p in [0, 1); 0 is task arithmetic.
        strength: λ.
        seed: What is dropped is a function of it, the name and the place in `tuned`, counted from the newest.
    """
    if drop == 0:
        return task_arithmetic(base, tuned, strength=strength)

    def merge(name: str, vectors: list[Tensor]) -> Tensor:
        newest = len(vectors) - 1
        draws = [generator(seed, "dare", name, newest - i) for i in range(len(vectors))]
        return torch.stack([dare(v, drop=drop, draw=draw) for v, draw in zip(vectors, draws, strict=True)]).sum(0)

    return merged_vectors(base, tuned, merge, strength=strength)


class DARE(Mitigation):
    """θ_t ← θ_0 + λ Σ_i DARE(τ_i) over the last stages: task arithmetic of sparse task vectors.

    For LoRA the vectors are the updates s B A; a sparse update has full rank, and bringing it back to the adapter's
    rank averages much of the sparsity out again (what is lost is in the record as `truncation`).

    Args:
        drop: p, the share that is dropped, in [0, 1).
        strength: λ >= 0.
        last: How many states take part, the newest included; null = all. 1 with drop 0 and strength 1 = off.
        first: After the first stage too.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"end of stage"})
    requires: frozenset[Capability] = frozenset({"averageable"})
    alternative: ClassVar[str] = (
        "configs/mitigation/replay.yaml, or an adapter whose states can be averaged (lora, full)"
    )

    def __init__(self, *, drop: float = 0.5, strength: float = 0.5, last: int | None = 2, first: bool = False) -> None:
        super().__init__()
        check_last(last, owner="DARE")
        if not (0 <= drop < 1 and strength >= 0):
            raise UserError(
                f"DARE with drop={drop}, strength={strength}",
                why="drop is the share of entries that is dropped, in [0, 1); the strength is not negative",
                fix="give drop: 0.5 and strength: 0.5",
            )
        self.drop = drop
        self.strength = strength
        self.last = last
        self.first = first
        self.uses_base = not self._off
        self.add_state("kept", {})

    @property
    def _off(self) -> bool:
        return self.drop == 0 and self.strength == 1 and self.last == 1

    def transform_weights(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Merge, and remember the state for the next stages."""
        if self._off:
            return after
        tuned = stage_weights(self, module, after, last=self.last)
        if not unless_first(module, first=self.first):
            return after
        seed = seed_of(module.stage.seed, "dare", module.stage.index)
        return dare_merge(module.base_weights, tuned, drop=self.drop, strength=self.strength, seed=seed)

    def grows_by(self, trainable: int) -> int:
        """A state per stage, unless only the last few are merged."""
        return 0 if self._off or self.last is not None else state_bytes(trainable)

    def changes_weights(self, index: int) -> bool:
        """Not when off, and after the first stage only if asked for."""
        return not self._off and (index > 0 or self.first)
