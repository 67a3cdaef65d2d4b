"""Lightning's own loggers (CSV, TensorBoard, MLflow ...) as views: one curve over the whole stream.

`--trainer.logger CSVLogger --trainer.logger.save_dir logs`, as in any Lightning project. Every stage has a Trainer of
its own, so every stage has a logger of its own; steps count over the stream and never restart, and what is logged is
what `history.jsonl` and the score matrices hold, under the names that W&B shows too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from residency.core.types import Stage
from residency.runs.views.base import RunInfo, View

__all__ = ["LoggerView"]

_PLACES = ("stage", "domain", "step", "stream_step", "time")


class LoggerView(View):
    """Hands every line of the history and every row of scores to the loggers of the running stage's Trainer."""

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._step = 0
        self._rows: list[dict[str, float]] = []

    def start(self, info: RunInfo, history: list[dict[str, Any]], rows: list[Mapping[str, Any]]) -> None:
        """What an earlier call has logged is in its own loggers' files."""
        self._step = int(history[-1]["stream_step"]) if history else 0

    def callbacks(self, info: RunInfo, stage: Stage) -> list[Callback]:
        """One that takes hold of the Trainer."""
        return [_Hold(self)]

    def hold(self, trainer: Trainer) -> None:
        """The loggers of this Trainer are written to from here on; scores from before the first stage come first."""
        self._trainer = trainer
        for values in self._rows:
            self._log(values)
        self._rows = []

    def step(self, line: Mapping[str, Any]) -> None:
        """`train/<name>` over the stream's steps."""
        self._step = int(line["stream_step"])
        numbers = {name: value for name, value in line.items() if name not in _PLACES}
        self._log({f"train/{name}": float(v) for name, v in numbers.items() if _number(v)} | {"stage": line["stage"]})

    def row(self, k: int, means: Mapping[str, Mapping[str, float]]) -> None:
        """`eval/<domain>/<scorer>` at the step after which it was scored."""
        values = {f"eval/{column}/{scorer}": v for scorer, own in means.items() for column, v in own.items()}
        known = {name: float(value) for name, value in values.items() if _number(value)} | {"stage": float(k)}
        if self._trainer is None:
            self._rows.append(known)
        else:
            self._log(known)
            for logger in self._trainer.loggers:
                logger.save()

    def _log(self, values: Mapping[str, float]) -> None:
        for logger in self._trainer.loggers if self._trainer is not None else []:
            logger.log_metrics(dict(values), step=self._step)


class _Hold(Callback):
    def __init__(self, view: LoggerView) -> None:
        self.view = view

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.view.hold(trainer)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
