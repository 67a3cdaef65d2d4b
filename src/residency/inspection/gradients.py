"""How even the training steps are (E19)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from residency.core.types import Stage
from residency.inspection.base import Observer
from residency.inspection.gradient_metrics import gradient_stability

if TYPE_CHECKING:
    from residency.domains.stream_data import StreamData

__all__ = ["GradientNorms"]


class GradientNorms(Observer):
    """E19: evenness of the global gradient norm of the whole loss, before clipping.

    Records `cv`, `mad_over_median`, `largest`, `spikes`, `steps`, and `clipper` and `seed`, which must be equal for two
    runs to be compared (`gradient_metrics.stability_improvement` refuses otherwise). The norm is taken
    after accumulation and unscaling, before `transform_gradients`: of what the loss asks for, not of what is granted.
    """

    def __init__(self) -> None:
        self._watch: _Watch | None = None

    def callbacks(self, stage: Stage, data: StreamData) -> list[Callback]:
        """A new watch."""
        self._watch = _Watch(seed=stage.seed)
        return [self._watch]

    def during(self) -> Mapping[str, Any]:
        """Stability over the stage's steps."""
        if self._watch is None or not self._watch.norms:
            return {}
        return asdict(gradient_stability(self._watch.norms, clipper=self._watch.clipper, seed=self._watch.seed))


class _Watch(Callback):
    """Keeps one number per optimizer step, also across a kill inside the stage."""

    def __init__(self, *, seed: int) -> None:
        self.seed = seed
        self.norms: list[float] = []
        self.clipper = "none"

    @property
    def state_key(self) -> str:
        """Its own entry in the checkpoint."""
        return "residency.inspection.gradients"

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """What clips afterwards."""
        if trainer.gradient_clip_val:
            algorithm = trainer.gradient_clip_algorithm
            self.clipper = f"{getattr(algorithm, 'value', algorithm) or 'norm'} {trainer.gradient_clip_val:g}"

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Lightning calls callbacks before the module's own hook (`transform_gradients`), and clips last."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    def state_dict(self) -> dict[str, Any]:
        """The norms so far."""
        return {"norms": list(self.norms)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.norms = list(state_dict["norms"])
