"""Synaptic intelligence (Zenke et al. 2017): what a parameter did for the loss while a domain was learned.

    ω_i ← ω_i - g_i Δθ_i                             every optimizer step
    Ω_i ← Ω_i + max(0, ω_i) / ((θ_i - θ_i^start)² + ξ)    after a domain
    L = L_t + c Σ_i Ω_i (θ_i - θ*_i)²

With small steps Σ ω is the drop of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.tensors import remembered
from residency.core.types import Batch, Capability, Outputs, Stage, Tensors
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.penalties.quadratic import penalty_numbers, penalty_term, pulled_gradients

__all__ = ["SI", "path_contribution", "path_importance"]


def path_contribution(gradients: Tensors, before: Tensors, after: Tensors) -> dict[str, Tensor]:
    """-g Δθ of one step, by name, float32; nothing for what had no gradient."""
    return {n: -g.float() * (after[n].float() - before[n].float()) for n, g in gradients.items()}


def path_importance(path: Tensors, start: Tensors, end: Tensors, *, xi: float) -> dict[str, Tensor]:
    """max(0, ω) / ((θ - θ^start)² + ξ), by name."""
    return {n: w.clamp_min(0) / ((end[n].float() - start[n].float()).square() + xi) for n, w in path.items()}


class SI(Mitigation):
    """Synaptic intelligence.

    The gradient g is read before anything is added to it or clipped, accumulated over micro-batches; losses that others
    add in `loss_terms` are part of it. Δθ is what the optimizer did, decay included, as far as the mitigations before
    this one have let it pass: put masks and projections first. It watches the first domain too, without changing it.

    Args:
        strength: c. The penalty is c Σ Ω (θ - θ*)², without a 1/2. 0 = off.
        xi: ξ > 0, in squared units of a parameter; bounds Ω where a parameter has hardly moved.

    Raises:
        UserError: A value is out of range.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"coordinates"})
    update_order: ClassVar[int] = 4
    requires: frozenset[Capability] = frozenset({"fixed_coordinates"})
    alternative: ClassVar[str] = (
        "configs/mitigation/replay.yaml, or an adapter with persistent coordinates (lora, full)"
    )
    first_domain: int = 0

    def __init__(self, *, strength: float = 0.5, xi: float = 1e-3) -> None:
        super().__init__()
        if strength < 0 or xi <= 0:
            raise UserError(
                f"SI with strength={strength}, xi={xi}",
                why="strength must be >= 0 and xi > 0",
                fix="correct these values in model.mitigations; the paper has xi: 0.001",
            )
        self.strength = strength
        self.xi = xi
        self.add_state("path", {})
        self.add_state("start", {})
        self.add_state("precision", {})
        self.add_state("anchor", {})
        self._gradients: dict[str, Tensor] = {}  # from the gradients to the update of one and the same step

    def on_domain_start(self, module: StageModule, stage: Stage) -> None:
        """The path of a domain begins."""
        if self.strength == 0:
            return
        start = remembered(module.adapter.trainable(module.model))
        zeros = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in start.items()}
        self.state.update(start=start, path=zeros)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Remember the gradient. Lightning calls this before the module folds `transform_gradients`, and then clips."""
        if self.strength == 0:
            return
        leaves = pl_module.adapter.trainable(pl_module.model)
        self._gradients = remembered({n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None})

    def loss_terms(self, module: StageModule, batch: Batch, outputs: Outputs) -> Mapping[str, Tensor]:
        """The penalty's value, for the log; nothing before the first domain is finished."""
        return penalty_term(module.adapter.trainable(module.model), self.state, strength=2 * self.strength)

    def transform_gradients(self, module: StageModule, gradients: Tensors) -> Tensors:
        """Add the penalty's gradient."""
        leaves = module.adapter.trainable(module.model)
        return pulled_gradients(gradients, leaves, self.state, strength=2 * self.strength)

    def transform_update(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Add the step to the path; the update itself stays as it is."""
        if self.strength == 0:
            return after
        gradients, self._gradients = self._gradients, {}
        path = self._named("path")
        steps = path_contribution(gradients, before, after)
        self.state["path"] = {name: path[name] + steps[name] if name in steps else path[name] for name in path}
        return after

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """Distance and pull, and Σ ω, the drop of the loss that the path explains."""
        found = penalty_numbers(module.adapter.trainable(module.model), self.state, strength=2 * self.strength)
        path = self._named("path")
        return {**found, "path": float(torch.stack([w.sum() for w in path.values()]).sum())} if path else found

    def on_domain_end(self, module: StageModule, stage: Stage) -> None:
        """Turn the path into importances, and forget it."""
        if self.strength == 0:
            return
        leaves = remembered(module.adapter.trainable(module.model))
        found = path_importance(self._named("path"), self._named("start"), leaves, xi=self.xi)
        old = self._named("precision")
        total = {name: old[name] + new for name, new in found.items()} if old else found
        self.state.update(precision=total, anchor=leaves, path={}, start={})

    def remembers(self, trainable: int, index: int) -> int:
        """Path and start of the stage; importances and anchor, once one is finished. All float32."""
        return (16 if index else 8) * trainable * (self.strength > 0)

    def touches_training(self, index: int) -> bool:
        """Not at strength 0."""
        return self.strength > 0 and super().touches_training(index)

    def _named(self, key: str) -> dict[str, Tensor]:
        value = self.state[key]
        assert isinstance(value, dict)
        return value
