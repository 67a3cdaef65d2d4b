"""L2-SP (Li et al. 2018): weight decay towards a starting point instead of towards 0.

    L = L_t + α/2 ‖w - w_0‖² + β/2 ‖w_new‖²

For LoRA w - w_0 is the update ΔW = s B A: α/2 ‖ΔW - ΔW*‖² = α/2 s² tr((LᵀL)(RRᵀ)), see
`penalties.kronecker`. With `decoupled` the pull acts as AdamW's decay does: θ ← θ - lr · pull(θ), after the
step and outside of the optimizer's moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.tensors import remembered
from residency.core.types import Batch, Capability, Outputs, Stage, Tensors
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.penalties.kronecker import low_rank_pulls
from residency.mitigations.penalties.quadratic import add_pulls

__all__ = ["L2SP", "decoupled_update", "l2_sp_pull", "learning_rates"]


def l2_sp_pull(
    parameters: Tensors, start: Tensors, *, alpha: float, beta: float = 0.0, new: Sequence[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """α/2 ‖w - w_0‖² + β/2 ‖w_new‖² and its gradient by name.

    Args:
        parameters: w and w_new by name.
        start: w_0 by the same names.
        alpha: α.
        beta: β.
        new: A parameter whose name contains one of these is new: it is pulled to 0.
    """
    values, pulls = [], {}
    for name, parameter in parameters.items():
        is_new = any(part in name for part in new)
        strength = beta if is_new else alpha
        difference = parameter.detach() if is_new else parameter.detach() - start[name]
        values.append(0.5 * strength * difference.float().square().sum())
        pulls[name] = strength * difference
    return torch.stack(values).sum(), pulls


def decoupled_update(parameters: Tensors, pulls: Tensors, rates: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
    """θ - lr · pull, by name; a parameter that no optimizer steps stays."""
    moved = {name: parameters[name] - rates[name] * pull for name, pull in pulls.items() if name in rates}
    return {**parameters, **moved}


def learning_rates(optimizer: Any, leaves: Tensors) -> dict[str, Any]:
    """The learning rate of every leaf in the step just made: groups may differ (LoRA+), and schedules come later."""
    by_leaf = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: by_leaf[id(leaf)] for name, leaf in leaves.items() if id(leaf) in by_leaf}


class L2SP(Mitigation):
    """L2 towards a starting point.

    Args:
        alpha: α on everything that has a starting point. With `beta` 0 too, 0 = off.
        beta: β on what is new; language modelling adds no layer, so it acts on the names in `new` only.
        new: Parts of parameter names, for example `[lm_head]` where `modules_to_save` trains a head.
        anchor: `pretrained`: where the stream began (from the first domain on); `previous`: where each domain began
            (from the second).
        space: Of LoRA: `weights` measures the update B A; `parameters` the factors themselves. Other adapters have
            parameters only.
        decoupled: Act after the optimizer's step, scaled by its learning rate, instead of through the gradient.

    Raises:
        UserError: A value is out of range.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"coordinates"})
    requires: frozenset[Capability] = frozenset({"fixed_coordinates"})
    alternative: ClassVar[str] = (
        "configs/mitigation/replay.yaml, or an adapter with persistent coordinates (lora, full)"
    )
    first_domain: int = 0

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        beta: float = 0.01,
        new: list[str] | None = None,
        anchor: Literal["pretrained", "previous"] = "pretrained",
        space: Literal["weights", "parameters"] = "weights",
        decoupled: bool = False,
    ) -> None:
        super().__init__()
        if alpha < 0 or beta < 0:
            raise UserError(
                f"L2SP with alpha={alpha}, beta={beta}",
                why="both are strengths of a pull and must be >= 0",
                fix="correct these values in model.mitigations",
            )
        self.alpha = alpha
        self.beta = beta
        self.new = list(new or [])
        self.anchor = anchor
        self.space = space
        self.decoupled = decoupled
        self.add_state("anchor", {})

    def on_domain_start(self, module: StageModule, stage: Stage) -> None:
        """Remember the starting point."""
        if stage.index == 0 or self.anchor == "previous":
            self.state["anchor"] = remembered(module.adapter.trainable(module.model))

    def loss_terms(self, module: StageModule, batch: Batch, outputs: Outputs) -> Mapping[str, Tensor]:
        """The penalty's value, for the log; nothing if the pull is no part of the loss."""
        if self.decoupled or not self._acts(module.stage.index):
            return {}
        return {"penalty": self._pull(module, module.adapter.trainable(module.model))[0]}

    def transform_gradients(self, module: StageModule, gradients: Tensors) -> Tensors:
        """Add the pull."""
        if self.decoupled or not self._acts(module.stage.index):
            return gradients
        return add_pulls(gradients, self._pull(module, module.adapter.trainable(module.model))[1])

    def transform_update(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Or move by it, at the learning rate of the step."""
        if not self.decoupled or not self._acts(module.stage.index):
            return after
        rates = learning_rates(module.optimizers(use_pl_optimizer=False), module.adapter.trainable(module.model))
        return decoupled_update(after, self._pull(module, after)[1], rates)

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """‖w - w_0‖ in the space of the pull, and the norm of the pull."""
        if not self._acts(module.stage.index):
            return {}
        leaves = module.adapter.trainable(module.model)
        half_square, _ = self._pull(module, leaves, alpha=1.0, beta=0.0)
        pulls = self._pull(module, leaves)[1].values()
        pull = torch.stack([p.float().norm() for p in pulls]).norm()
        return {"distance": float(2 * half_square) ** 0.5, "pull": float(pull)}

    def remembers(self, trainable: int, index: int) -> int:
        """The anchor, float32."""
        return 4 * trainable

    def touches_training(self, index: int) -> bool:
        """Not at strength 0, and in the first stage only if it pulls to the pretrained weights."""
        return self._acts(index) and super().touches_training(index)

    def _acts(self, index: int) -> bool:
        strong = self.alpha > 0 or (self.beta > 0 and bool(self.new))
        return strong and (index > 0 or self.anchor == "pretrained")

    def _pull(
        self, module: StageModule, leaves: Tensors, *, alpha: float | None = None, beta: float | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        start = self.state["anchor"]
        assert isinstance(start, dict)
        strength = self.alpha if alpha is None else alpha
        if self.space == "weights" and "low_rank" in module.adapter.provides:
            return low_rank_pulls(module.adapter.low_rank_layers(module.model), leaves, start, strength=strength)
        rest = self.beta if beta is None else beta
        return l2_sp_pull(leaves, start, alpha=strength, beta=rest, new=self.new)
