"""ZClip (Kumar et al. 2025): clip a gradient whose norm is an outlier among those before it.

    z = (‖g‖ - μ) / σ;    if z > threshold:  ‖g‖ <- μ + threshold² / z · σ

μ and σ² are exponential averages of the norms before clipping; a clipped one enters them as it was clipped, so that one
spike does not raise the bar for the next. The larger the spike, the shorter what is left of it. Nothing is clipped
during the first `warmup` steps, whose plain mean and variance are where the averages start.

A comparison of gradient stability must have the same clipper in both arms, and compare norms before clipping (`norm`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.types import Stage, Tensors
from residency.mitigations.base import Mitigation
from residency.mitigations.contract import StageModule

__all__ = ["ZClip", "clipped_norm", "updated"]

# Floor of the standard deviation relative to the mean: norms that are equal up to rounding are no outliers.
_FLAT = 1e-3


def clipped_norm(norm: Tensor, mean: Tensor, variance: Tensor, *, threshold: float) -> Tensor:
    """The norm that a gradient may have.

    Args:
        norm: ‖g‖ before clipping.
        mean: μ.
        variance: σ².
        threshold: z above which is clipped.

    Returns:
        At most ‖g‖. σ counts as at least a thousandth of μ.
    """
    sigma = variance.sqrt().clamp_min(_FLAT * mean).clamp_min(torch.finfo(mean.dtype).tiny)
    z = (norm - mean) / sigma
    return torch.where(z > threshold, mean + threshold**2 / z * sigma, norm)


def updated(statistics: Tensor, norm: Tensor, *, decay: float, warmup: int) -> Tensor:
    """Take one norm into (steps, mean, variance): a plain average over the first `warmup` steps, then exponential."""
    steps, mean, variance = statistics.unbind()
    rate = torch.where(steps < warmup, 1 / (steps + 1), torch.full_like(steps, 1 - decay))
    new_mean = mean + rate * (norm - mean)
    # Plain averages: Welford's update. Exponential ones: the authors', whose distance is from the new mean.
    distance = torch.where(steps < warmup, (norm - mean) * (norm - new_mean), (norm - new_mean).square())
    return torch.stack([steps + 1, new_mean, variance + rate * (distance - variance)])


class ZClip(Mitigation):
    """Adaptive gradient clipping. It comes before `trainer.gradient_clip_val`, which may be null beside it.

    It acts from the first domain on. The averages go on from domain to domain by default, so that the jump at a change
    of domain is an outlier too.

    Args:
        threshold: z above which is clipped; `.inf` = off.
        decay: α of the averages, in [0, 1).
        warmup: Steps before anything is clipped.
        per_domain: Begin anew, with a warm-up, in every domain.
    """

    shardable = True
    first_domain: int = 0
    gradient_order: ClassVar[int] = 2

    def __init__(
        self, *, threshold: float = 2.5, decay: float = 0.97, warmup: int = 25, per_domain: bool = False
    ) -> None:
        super().__init__()
        if not threshold > 0 or not 0 <= decay < 1 or warmup < 1:
            raise UserError(
                f"ZClip with threshold={threshold}, decay={decay}, warmup={warmup}",
                why="the threshold is above 0 (.inf = off), the decay in [0, 1), the warm-up at least one step",
                fix="use the paper's threshold: 2.5, decay: 0.97 and warmup: 25",
            )
        self.threshold = threshold
        self.decay = decay
        self.warmup = warmup
        self.per_domain = per_domain
        self.add_state("statistics", torch.zeros(3))
        self.add_state("last", torch.zeros(2))

    def on_domain_start(self, module: StageModule, stage: Stage) -> None:
        """Forget the averages, if asked for."""
        if self.per_domain:
            self.state["statistics"] = torch.zeros_like(self._tensor("statistics"))

    @torch.no_grad()
    def transform_gradients(self, module: StageModule, gradients: Tensors) -> Tensors:
        """Shorten an outlier. A gradient that is not finite is left alone and leaves no trace."""
        if math.isinf(self.threshold) or not gradients:
            return gradients
        statistics = self._tensor("statistics")
        norm = torch.stack([g.float().norm() for g in gradients.values()]).norm()
        if not torch.isfinite(norm):
            return gradients
        steps, mean, variance = statistics.unbind()
        allowed = clipped_norm(norm, mean, variance, threshold=self.threshold)
        clips = bool(steps >= self.warmup) and bool(allowed < norm)
        effective = allowed if clips else norm
        self.state["statistics"] = updated(statistics, effective, decay=self.decay, warmup=self.warmup)
        self.state["last"] = torch.stack([norm, effective])
        return {name: g * (effective / norm).to(g.dtype) for name, g in gradients.items()} if clips else gradients

    def touches_training(self, index: int) -> bool:
        """Not with an infinite threshold."""
        return math.isfinite(self.threshold) and super().touches_training(index)

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """Of the step before: `norm` before and `clipped` after; `mean` and `sigma` of the averages."""
        _, mean, variance = self._tensor("statistics").tolist()
        norm, clipped = self._tensor("last").tolist()
        return {"norm": norm, "clipped": clipped, "mean": mean, "sigma": math.sqrt(max(0.0, variance))}

    def _tensor(self, key: str) -> Tensor:
        value = self.state[key]
        assert isinstance(value, Tensor)
        return value
