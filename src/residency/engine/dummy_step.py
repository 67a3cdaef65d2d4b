"""Optimizer and schedule of every stage, built and stepped on a dummy before row 0 is scored."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from residency.core.errors import UserError
from residency.engine.schedules import stage_scheduler

__all__ = ["check_optimization"]

_MOST_STEPS = 20_000


def check_optimization(
    optimizer: Callable[[Any], Optimizer], scheduler: Callable[[Optimizer], Any] | None, *, steps: Iterable[int]
) -> None:
    """What a stage would find out when it starts, after minutes of scoring.

    Args:
        optimizer: Makes one for a list of parameters.
        scheduler: Makes one for an optimizer; `None` = the learning rate is constant.
        steps: Of every stage.

    Raises:
        UserError: One of them refuses its numbers, needs what a stage does not give, or does not bear that many steps.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _step_optimizer(optimizer)
        if scheduler is not None:
            for count in sorted({*steps}):
                _step_scheduler(optimizer, scheduler, count)


def _dummy(optimizer: Callable[[Any], Optimizer]) -> tuple[nn.Parameter, Optimizer]:
    leaf = nn.Parameter(torch.ones(8, 8))
    leaf.grad = torch.ones_like(leaf)
    return leaf, optimizer([leaf])


def _step_optimizer(factory: Callable[[Any], Optimizer]) -> None:
    try:
        leaf, optimizer = _dummy(factory)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        optimizer.step()
    except UserError:
        raise
    except Exception as error:  # optimizers of any package
        raise UserError(
            f"model.optimizer: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            why="it was built, and stepped once, on a dummy, as a stage will do it",
            fix="correct its init_args; `configs/quickstart.yaml` has a complete one (torch.optim.AdamW)",
        ) from error
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates) or not bool(leaf.isfinite().all()):
        raise UserError(
            f"model.optimizer: lr={rates[0]}",
            why="one step with it on a dummy gives weights that are not finite",
            fix="give a learning rate such as 2e-4, and correct the optimizer's other numbers",
        )


def _step_scheduler(factory: Callable[[Any], Optimizer], scheduler: Callable[[Optimizer], Any], steps: int) -> None:
    _, optimizer = _dummy(factory)
    try:
        made = stage_scheduler(scheduler, optimizer, steps=steps)
        if isinstance(made, ReduceLROnPlateau):
            raise UserError(
                f"model.scheduler: {type(made).__name__}",
                why="it waits for a score of a validation, and a stage steps its schedule after every optimizer step",
                fix="use configs/scheduler/cosine.yaml (or linear, constant); to stop early, "
                "configs/mitigation/early_stopping.yaml",
            )
        for _ in range(min(steps, _MOST_STEPS)):
            optimizer.step()
            made.step()
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
                raise ValueError(f"it sets the learning rate to {rates[0]}")
    except UserError:
        raise
    except Exception as error:  # schedulers of any package
        raise UserError(
            f"model.scheduler: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            why=f"it was stepped on a dummy {steps} times, as a stage of {steps} steps will do it",
            fix="correct its init_args, or use configs/scheduler/cosine.yaml, which knows the steps of a stage",
        ) from error
