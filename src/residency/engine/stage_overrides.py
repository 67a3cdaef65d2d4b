"""What one stage does otherwise than its run: length, batch, learning rate, schedule, objective (design, 3.4)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import Optimizer

from residency.core.errors import UserError
from residency.core.types import Stage
from residency.objectives.base import Objective

__all__ = [
    "StageOverrides",
    "StageSettings",
    "at_rate",
    "check_overrides",
    "describe_stages",
    "of_stage",
    "stage_config",
    "told_of",
]

_OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {}}


@dataclass(frozen=True, kw_only=True)
class StageOverrides:
    """Settings of the stage of one domain; what is not given is the run's.

    Args:
        epochs: Passes over the domain's training rows.
        steps: Optimizer steps, instead of passes.
        batch_size: Examples per optimizer step, over all devices and accumulated micro-batches.
        lr: Learning rate of the run's optimizer, the peak where there is a schedule.
        optimizer: Instead of the run's, with a rate of its own.
        scheduler: Instead of the run's.
        objective: Instead of the run's.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    optimizer: OptimizerCallable | None = None
    scheduler: LRSchedulerCallable | None = None
    objective: Objective | None = None

    @property
    def given(self) -> dict[str, Any]:
        """{name: value} of what differs from the run."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


def of_stage(overrides: Mapping[str, StageOverrides], domain: str) -> StageOverrides:
    """The overrides of a domain's stage; where there are none, those that change nothing."""
    return overrides.get(domain, StageOverrides())


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """By what each stage of a run is learned.

    Args:
        run: Of the stages without overrides; a part that is not given is left to the module.
        own: Overrides by domain.
    """

    run: StageOverrides = StageOverrides()
    own: Mapping[str, StageOverrides] = field(default_factory=dict)

    def objective(self, domain: str) -> Objective | None:
        """What the stage of a domain minimises; `None` = what the module has."""
        return of_stage(self.own, domain).objective or self.run.objective

    def objectives(self, run: Objective) -> list[Objective]:
        """The objective of the run, and those that single stages have instead."""
        return [run, *(own.objective for own in self.own.values() if own.objective)]

    def factories(
        self, domain: str, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None
    ) -> tuple[OptimizerCallable, LRSchedulerCallable | None]:
        """What makes optimizer and schedule of the stage of a domain.

        Args:
            domain: Its name.
            optimizer: Of the module.
            scheduler: Of the module.
        """
        own = of_stage(self.own, domain)
        if own.optimizer is None and own.lr is not None:
            optimizer = at_rate(optimizer, own.lr)
        return own.optimizer or optimizer, own.scheduler or scheduler


def at_rate(factory: OptimizerCallable, lr: float) -> OptimizerCallable:
    """A factory whose optimizers are, bit for bit, those that were constructed with another learning rate.

    Args:
        factory: Makes an optimizer of parameters or groups of them.
        lr: Of every group that has no rate of its own.
    """

    def make(parameters: Any) -> Optimizer:
        optimizer = factory(parameters)
        peak = optimizer.defaults["lr"]
        for group in optimizer.param_groups:
            if group["lr"] == peak:
                group["lr"] = lr
        optimizer.defaults["lr"] = lr
        return optimizer

    return make


def check_overrides(
    overrides: Mapping[str, StageOverrides], *, domains: Mapping[str, object], stage_tokens: int | None = None
) -> None:
    """What can be told of the numbers alone.

    Args:
        overrides: By domain.
        domains: The run's.
        stage_tokens: The run's budget in tokens.

    Raises:
        UserError: A domain that is not there, two lengths, two rates, or a number that cannot be.
    """
    unknown = sorted({*overrides} - {*domains})
    if unknown:
        raise UserError(
            f"stages names {', '.join(unknown)}, data.domains has {', '.join(sorted(domains))}",
            why="the settings of a stage are given under the name of its domain",
            fix="correct the name",
        )
    for name, own in overrides.items():
        _check_numbers(name, own)
        if stage_tokens is not None and (own.epochs or own.steps):
            raise UserError(
                f"stages.{name} has {'epochs' if own.epochs else 'steps'}, and stage_tokens is {stage_tokens:,}",
                why="both say how long the stage is",
                fix="leave one of them out; a study's budget in tokens sets stage_tokens",
            )


def _check_numbers(name: str, own: StageOverrides) -> None:
    for both in (("epochs", "steps"), ("lr", "optimizer")):
        if all(getattr(own, key) is not None for key in both):
            raise UserError(
                f"stages.{name} has {both[0]} and {both[1]}",
                why=f"both say {'how long the stage is' if 'steps' in both else 'at which rate it learns'}",
                fix="leave one of them out",
            )
    for key in ("epochs", "steps", "batch_size"):
        value = getattr(own, key)
        if value is not None and value < 1:
            raise UserError(
                f"stages.{name}.{key} is {value}",
                why="a stage needs at least one step of at least one example; a domain that is not to be trained is "
                "left out of data.order",
                fix="give 1 or more",
            )
    if own.lr is not None and not (math.isfinite(own.lr) and own.lr >= 0):
        raise UserError(
            f"stages.{name}.lr is {own.lr}", why="a learning rate is 0 or more", fix="give for example 1e-4"
        )


@contextmanager
def told_of(domain: str, own: StageOverrides) -> Iterator[None]:
    """What goes wrong inside is told of this stage, if it has settings of its own.

    Raises:
        UserError: The one that was raised inside, with the name of the stage.
    """
    try:
        yield
    except UserError as error:
        if not own.given:
            raise
        raise UserError(f"stages.{domain}: {error.got}", why=error.why, fix=error.fix) from error


def describe_stages(stages: Sequence[Stage], overrides: Mapping[str, StageOverrides]) -> list[str]:
    """A line per stage, if one of them has settings of its own: `FOMC: 186 steps of 8 rows (epochs 3, lr 0.0001)`.

    Args:
        stages: Of the run.
        overrides: By domain.
    """
    if not any(overrides[stage.domain].given for stage in stages if stage.domain in overrides):
        return []
    lines = []
    for stage in stages:
        own = of_stage(overrides, stage.domain).given
        words = [f"{key} {_worded(value)}" for key, value in own.items() if key not in ("steps", "batch_size")]
        length = f"{stage.domain}: {stage.steps} steps of {stage.batch_size} rows"
        lines.append(f"{length} ({', '.join(words)})" if words else length)
    return lines


def _worded(value: Any) -> str:
    if isinstance(value, int | float):
        return f"{value:g}"
    # What jsonargparse makes of a class that still needs arguments holds the class as its first one.
    named = next((arg for arg in getattr(value, "args", ()) if isinstance(arg, type)), type(value))
    return named.__name__


def stage_config(config: Mapping[str, Any], domain: str) -> dict[str, Any]:
    """What the config of a run says of one stage: equal settings are written equally, wherever they are written.

    Args:
        config: The resolved config.
        domain: Of the stage.

    Returns:
        {"objective", "optimizer", "scheduler", "batch_size"}, as in the config of a run that has them for all stages.
    """
    model, data = config["model"], config["data"]
    own = (config.get("stages") or {}).get(domain) or {}
    found = {key: own.get(key) or model.get(key) for key in ("objective", "optimizer", "scheduler")}
    if own.get("lr") is not None:
        optimizer: dict[str, Any] = copy.deepcopy(model.get("optimizer") or _OPTIMIZER)
        optimizer["init_args"] = {**(optimizer.get("init_args") or {}), "lr": own["lr"]}
        found["optimizer"] = optimizer
    return found | {"batch_size": own.get("batch_size") or data.get("batch_size")}
