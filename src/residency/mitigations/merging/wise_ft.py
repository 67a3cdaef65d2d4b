"""WiSE-FT (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models"): mix with the pretrained model."""

from __future__ import annotations

from typing import ClassVar

from residency.core.errors import UserError
from residency.core.types import Capability, Tensors
from residency.mitigations.base import Guarantee, Into, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.merging.states import check_into, unless_first
from residency.mitigations.merging.weight_mixing import mix

__all__ = ["WiseFT"]


class WiseFT(Mitigation):
    """θ_t ← (1 - α) θ_0 + α θ_t after every stage, θ_0 = the weights before the first one, in the averaging space.

    For LoRA θ_0 is "no update": the mix is α s B A, the adapter with its scale multiplied by α, exactly.

    Args:
        alpha: Weight of the trained model, in [0, 1]. 1 = off, 0 = the pretrained model (both exact).
        first: After the first stage too.
        into: `serve`, as published: the mixed weights are scored and exported, and training goes on unmixed; `train`:
            it goes on from them, so that what a stage has learned shrinks by α after every later one, too.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"end of stage"})
    requires: frozenset[Capability] = frozenset({"averageable"})
    alternative: ClassVar[str] = (
        "configs/mitigation/replay.yaml, or an adapter whose states can be averaged (lora, full)"
    )

    def __init__(self, *, alpha: float = 0.5, first: bool = True, into: Into = "serve") -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(
                f"WiseFT with alpha={alpha}",
                why="alpha is the weight of the trained model, between 0 (the pretrained one) and 1 (no mixing)",
                fix="give a value in [0, 1], for example alpha: 0.5",
            )
        self.alpha = alpha
        self.first = first
        self.into = check_into(into, owner="WiseFT")
        self.uses_base = alpha < 1

    def transform_weights(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Mix with the base."""
        if self.alpha == 1 or not unless_first(module, first=self.first):
            return after
        return mix(module.base_weights, after, alpha=self.alpha)

    def changes_weights(self, index: int) -> bool:
        """Not at alpha 1, and after the first stage only if asked for."""
        return self.alpha != 1 and (index > 0 or self.first)
