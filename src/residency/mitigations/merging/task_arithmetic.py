"""Task arithmetic (Ilharco et al. 2023): add the task vectors of several states to the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from residency.core.errors import UserError
from residency.core.tensors import weighted_sum
from residency.core.types import Capability, Tensors
from residency.mitigations.base import Guarantee, Into, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.merging.states import check_into, check_last, stage_weights, state_bytes, unless_first

__all__ = ["TaskArithmetic", "task_arithmetic"]


def task_arithmetic(base: Tensors, tuned: Sequence[Tensors], *, strength: float) -> Tensors:
    """θ_0 + λ Σ τ_i with τ_i = θ_i - θ_0, name by name; what is a product stays one.

    Args:
        base: θ_0.
        tuned: θ_1 ... θ_n, same names and shapes, at least one.
        strength: λ. 1/n is the mean of the states. At 0, and at 1 for a single state, the very object is returned.
    """
    if strength == 0:
        return base
    if strength == 1 and len(tuned) == 1:
        return tuned[0]
    return weighted_sum([(1 - strength * len(tuned), base), *((strength, weights) for weights in tuned)])


class TaskArithmetic(Mitigation):
    """θ_t ← θ_0 + λ Σ_i τ_i over the last stages, τ_i = what lies between the base and the state that stage i left.

    States are remembered as training left them. Training goes on from the merged weights, so τ_t holds a part of what
    came before: λ = 1 / `last` keeps the mean of the states, and the sum of what each stage alone has changed is
    `WeightMixing`, θ_{t-1} + α (θ_t - θ_{t-1}).

    Args:
        strength: λ >= 0.
        last: How many states take part, the newest included; null = all. 1 with strength 1 = off.
        first: After the first stage too (then it is λ τ_1).
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
        self, *, strength: float = 0.5, last: int | None = 2, first: bool = False, into: Into = "train"
    ) -> None:
        super().__init__()
        check_last(last, owner="TaskArithmetic")
        if not strength >= 0:
            raise UserError(
                f"TaskArithmetic with strength={strength}",
                why="it multiplies the sum of the task vectors and is not negative",
                fix="give strength: 0.5; with last: 2 that is the mean of two states",
            )
        self.strength = strength
        self.last = last
        self.first = first
        self.into = check_into(into, owner="TaskArithmetic")
        self.uses_base = not self._off
        self.add_state("kept", {})

    @property
    def _off(self) -> bool:
        return self.strength == 1 and self.last == 1

    def transform_weights(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Merge, and remember the state for the next stages."""
        if self._off:
            return after
        tuned = stage_weights(self, module, after, last=self.last)
        if not unless_first(module, first=self.first):
            return after
        return task_arithmetic(module.base_weights, tuned, strength=self.strength)

    def grows_by(self, trainable: int) -> int:
        """A state per stage, unless only the last few are merged."""
        return 0 if self._off or self.last is not None else state_bytes(trainable)

    def changes_weights(self, index: int) -> bool:
        """Not when off, and after the first stage only if asked for."""
        return not self._off and (index > 0 or self.first)
