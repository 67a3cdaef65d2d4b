"""A few steps and a few rows of a run: how long they take on this machine. What they make is thrown away."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from residency.core.types import Example
from residency.domains.stream_data import StreamData
from residency.engine.checkpointing import History
from residency.engine.scoring.evaluation import evaluate
from residency.engine.scoring.settings import EvaluationSettings
from residency.engine.stage import train_stage
from residency.runs.stage_runner import StageRunner

__all__ = ["column_seconds", "step_seconds"]

STEPS, ROWS = 3, 8


def step_seconds(runner: StageRunner) -> float:
    """Seconds of an optimizer step of the first stage.

    The first step is not counted: it is slower than all others.
    """
    runner.build()
    stage = replace(runner.stages[0], steps=STEPS)
    seconds: list[float] = []

    def write(line: Mapping[str, Any]) -> None:
        seconds.append(float(line["seconds"]))

    with TemporaryDirectory() as folder:
        train_stage(
            module=runner.module,
            data=runner.data,
            trainers=runner.trainers,
            stage=stage,
            folder=Path(folder),
            history=History(stage=stage, every_n_steps=1, offset=0, write=write),
            observers=[],
            checkpoint_every_n_steps=0,
        )
    counted = seconds[1:]
    return sum(counted) / len(counted)


class _Few:
    """A stream's data with every n-th row of a split."""

    def __init__(self, data: StreamData, every: int) -> None:
        self.data = data
        self.columns = data.columns
        self.labels = data.labels
        self.every = every

    def evaluation_examples(self, *args: Any, **options: Any) -> list[Example]:
        """Evenly spread rows: those with labels to choose from come first in a split."""
        return self.data.evaluation_examples(*args, **options)[:: self.every]


def column_seconds(runner: StageRunner, name: str) -> float:
    """Seconds of scoring all rows of a column, by some of them."""
    settings: EvaluationSettings = runner.settings.evaluation
    every = max(1, len(runner.data.columns[name].rows(runner.settings.split)) // ROWS)
    if settings.generation_rows is not None:
        settings = replace(settings, generation_rows=max(1, settings.generation_rows // every))
    few = cast("StreamData", _Few(runner.data, every))
    start = time.perf_counter()
    evaluate(runner.module, few, split=runner.settings.split, settings=settings, columns=[name])
    return every * (time.perf_counter() - start)
