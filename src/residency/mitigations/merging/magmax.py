"""MagMax (Marczak et al. 2024, arXiv 2407.06322): per parameter the largest change that any stage has made."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.types import Capability, Tensors
from residency.mitigations.base import Guarantee, Into, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.merging.states import check_into, merged, unless_first

__all__ = ["MagMax", "larger", "largest_changes"]


def larger(old: Tensor, new: Tensor) -> Tensor:
    """Per entry the one of larger magnitude, `new` where both are equally large; any equal shapes.

    Associative: folding it over τ_1 ... τ_T is choosing among all of them at once, so that one vector is remembered.
    """
    return torch.where(new.abs() >= old.abs(), new, old)


def largest_changes(kept: Tensors, base: Tensors, tuned: Tensors, *, past: float) -> dict[str, Tensor]:
    """τ* after one more stage: `larger` of `past` τ* and τ = θ - θ_0, name by name.

    Args:
        kept: τ* so far, float32; lacks a name that no stage has changed yet.
        base: θ_0.
        tuned: θ, same names and shapes; integer tensors have no change.
        past: Factor on `kept`, >= 0.

    Returns:
        In float32.
    """
    found = {}
    for name in tuned:
        after = tuned[name]
        if after.is_floating_point():
            vector = after.float() - base[name].float()
            found[name] = larger(past * kept[name], vector) if name in kept and past else vector
    return found


class MagMax(Mitigation):
    """Serve θ_0 + λ τ* with τ*_i = the τ_{k,i} of largest magnitude over all stages k, τ_k = θ_k - θ_0.

    Trained one after the other and unmerged, as published; equal magnitudes go to the later stage. One task vector is
    remembered, however many stages there are, in the adapter's averaging space: for LoRA the updates s B A, each as
    large as its layer. The result of an entry-wise choice has full rank and is brought back to the adapter's: what that
    loses is in the record as `served/truncation`.

    Args:
        strength: λ >= 0 (released code: 0.5). 0 = the pretrained model, exactly.
        past: Factor on what earlier stages have left, in [0, 1], every time a stage is added. 1 as published; 0, with
            strength 1 = off.
        first: After the first stage too (then it is λ τ_1).
        into: `serve`: merged weights are scored and exported, and training goes on unmerged; `train`: it goes on from
            them.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"end of stage"})
    requires: frozenset[Capability] = frozenset({"averageable"})
    alternative: ClassVar[str] = (
        "configs/mitigation/replay.yaml, or an adapter whose states can be averaged (lora, full)"
    )

    def __init__(self, *, strength: float = 0.5, past: float = 1.0, first: bool = True, into: Into = "serve") -> None:
        super().__init__()
        if not (strength >= 0 and 0 <= past <= 1):
            raise UserError(
                f"MagMax with strength={strength}, past={past}",
                why="the strength multiplies the merged change and is not negative; past is the part of earlier "
                "changes that is compared, in [0, 1]",
                fix="the released values are strength: 0.5 and past: 1.0",
            )
        self.strength = strength
        self.past = past
        self.first = first
        self.into = check_into(into, owner="MagMax")
        self.uses_base = not self._off
        self.add_state("vector", {})

    @property
    def _off(self) -> bool:
        return self.strength == 1 and self.past == 0

    def transform_weights(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Take the stage's task vector in, and merge."""
        if self._off:
            return after
        base, kept = module.base_weights, self.state["vector"]
        assert isinstance(kept, dict)
        vector = largest_changes(kept, base, after, past=self.past)
        self.state["vector"] = vector
        if not unless_first(module, first=self.first):
            return after
        if self.strength == 0:
            return base
        return merged(after, lambda name: base[name].float() + self.strength * vector[name])

    def changes_weights(self, index: int) -> bool:
        """Not when off, and after the first stage only if asked for."""
        return not self._off and (index > 0 or self.first)
