"""Learning-rate schedules that know how many steps their stage has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from residency.core.errors import UserError

__all__ = ["StageSchedule", "lr_factor", "stage_scheduler", "with_schedule"]

Decay = Literal["constant", "linear", "cosine"]


def lr_factor(step: int, *, steps: int, warmup: int, decay: Decay, floor: float) -> float:
    """By what the peak learning rate is multiplied in one step of a stage.

        (s + 1) / w                          for s < w
        f + (1 - f) g((s - w) / (S - w))     else;   g(p) = 1, 1 - p, (1 + cos πp) / 2

    (Cosine: Loshchilov and Hutter 2017, equation 5, without restarts; linear warm-up: Goyal et al. 2017, 2.2. The first
    step is not lost to a learning rate of zero.)

    Args:
        step: s, from 0.
        steps: S of the stage.
        warmup: w, steps until the peak.
        decay: g.
        floor: f, share of the peak that is approached at the end.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    share = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[decay]
    return floor + (1 - floor) * share


class StageSchedule(LRScheduler):
    """Linear warm-up, then a decay over what is left of the stage.

    Args:
        optimizer: Of the stage; the learning rates it has are the peaks.
        warmup: Steps until the peak, or, below 1, their share of the stage.
        decay: What follows.
        floor: Share of the peak that is approached at the end.

    Raises:
        UserError: `warmup` or `floor` cannot be.
    """

    def __init__(
        self, optimizer: Optimizer, *, warmup: float = 0.03, decay: Decay = "cosine", floor: float = 0.0
    ) -> None:
        if (
            not (math.isfinite(warmup) and warmup >= 0)
            or (warmup >= 1 and warmup != int(warmup))
            or not 0 <= floor <= 1
        ):
            raise UserError(
                f"model.scheduler: warmup={warmup}, floor={floor}",
                why="warm-up is a share of the stage below 1 or a whole number of steps, and the floor a share of the "
                "peak from 0 to 1",
                fix="give for example warmup: 0.03, floor: 0.0",
            )
        self.warmup = warmup
        self.decay: Decay = decay
        self.floor = floor
        self.steps = 1
        super().__init__(optimizer)

    def begin(self, steps: int) -> None:
        """Learn how many steps the stage has, before its first.

        Raises:
            UserError: The warm-up is longer than the stage.
        """
        self.steps = steps
        if self._warmup_steps > steps:
            raise UserError(
                f"model.scheduler.warmup={self.warmup}, and a stage has {steps} steps",
                why="it would end before its learning rate is reached",
                fix="give a share of the stage, for example 0.03, or fewer steps",
            )
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
        self._last_lr = self.get_lr()

    @property
    def _warmup_steps(self) -> int:
        return round(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)

    def get_lr(self) -> list[Any]:
        """The learning rate of every group in the step that comes next."""
        factor = lr_factor(
            self.last_epoch, steps=self.steps, warmup=self._warmup_steps, decay=self.decay, floor=self.floor
        )
        return [base * factor for base in self.base_lrs]


def stage_scheduler(factory: Callable[[Optimizer], Any], optimizer: Optimizer, *, steps: int) -> Any:
    """The schedule of one stage."""
    scheduler = factory(optimizer)
    if isinstance(scheduler, StageSchedule):
        scheduler.begin(steps)
    return scheduler


def with_schedule(optimizer: Optimizer, factory: Callable[[Optimizer], Any], *, steps: int) -> dict[str, Any]:
    """What Lightning is told of an optimizer and its schedule, which is stepped after every optimizer step."""
    scheduler = stage_scheduler(factory, optimizer, steps=steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
