"""Exponential moving average of the weights over the steps of a stage (Tarvainen and Valpola 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from residency.core.errors import UserError
from residency.core.types import Tensors
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.contract import StageModule

__all__ = ["EMA", "ema_step", "ema_weight"]


def ema_weight(n: int, decay: float) -> float:
    """Weight of the n-th value (from 1) in the bias-corrected average of n values: (1 - β) / (1 - βⁿ).

    The average m_n = Σ_k βⁿ⁻ᵏ θ_k (1 - β) / (1 - βⁿ) obeys m_n = m_{n-1} + weight · (θ_n - m_{n-1}): the correction
    needs no division of a small number by a small number, and the first average is the first value.
    """
    return (1 - decay) / (1 - decay**n) if n > 1 else 1.0


def ema_step(average: Tensors, values: Tensors, *, n: int, decay: float) -> dict[str, Tensor]:
    """The average after the n-th value.

    Args:
        average: After n - 1 values, float32 or finer; empty for n = 1.
        values: The n-th value, by name.
        n: From 1.
        decay: β in [0, 1).
    """
    if not average:
        return {name: value.detach().float().clone() for name, value in values.items()}
    weight = ema_weight(n, decay)
    return {name: torch.lerp(average[name], value.detach().float(), weight) for name, value in values.items()}


class EMA(Mitigation):
    """After a stage, take the bias-corrected moving average of its steps instead of its last step.

    What is averaged are the parameters that train: within a stage they keep their meaning, whatever the adapter is. For
    LoRA the product of the averages of B and A differs from the average of the products by their covariance over the
    window, of second order in how far the factors move in it; between stages, where it would not be small, nothing is
    averaged. The average replaces the parameters before the adapter ends the stage; the course of training is
    untouched.

    Args:
        decay: β in [0, 1): the window is about 1 / (1 - β) steps. With fewer steps it is nearly their mean. 0 = off.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"last step"})
    first_domain: int = 0

    def __init__(self, *, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise UserError(
                f"EMA with decay={decay}",
                why="the decay is the weight of the past after a step, in [0, 1); 1 would never learn",
                fix="give decay: 0.9 for a window of about ten steps",
            )
        self.decay = decay
        self.add_state("average", {})
        self.add_state("steps", torch.zeros((), dtype=torch.long))

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        """Take a step in, once its last micro-batch is done."""
        step, average = trainer.global_step, self.state["average"]
        if self.decay == 0 or step == self._steps:
            return
        assert isinstance(average, dict)
        leaves = module.adapter.trainable(module.model)
        self.state["average"] = ema_step(average, leaves, n=step, decay=self.decay)
        self.state["steps"] = torch.tensor(step)

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        """Put the average in the place of the last step, and start anew."""
        average = self.state["average"]
        assert isinstance(average, dict)
        leaves = module.adapter.trainable(module.model) if average else {}
        for name, leaf in leaves.items():
            leaf.copy_(average[name])
        self.state.update(average={}, steps=torch.zeros((), dtype=torch.long))

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """`distance`: norm of the parameters less their average so far."""
        average = self.state["average"]
        if not average:
            return {}
        assert isinstance(average, dict)
        leaves = module.adapter.trainable(module.model)
        squares = [(leaf.detach().float() - average[name]).square().sum() for name, leaf in leaves.items()]
        return {"distance": float(torch.stack(squares).sum().sqrt())}

    def remembers(self, trainable: int, index: int) -> int:
        """The average, float32."""
        return 4 * trainable * (self.decay > 0)

    def touches_training(self, index: int) -> bool:
        """Not at decay 0."""
        return self.decay > 0 and super().touches_training(index)

    @property
    def _steps(self) -> int:
        steps = self.state["steps"]
        assert isinstance(steps, Tensor)
        return int(steps)
