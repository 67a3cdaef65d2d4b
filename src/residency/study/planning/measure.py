"""A few steps and a few rows: time and disk of a plan, before anything comparable is in the store."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from residency.core.tensors import size_in_bytes
from residency.core.types import Example
from residency.domains.stream_data import StreamData
from residency.engine.checkpointing import History
from residency.engine.scoring.evaluation import EvaluationSettings, evaluate
from residency.engine.stage import train_stage
from residency.study.planning.resolve import Resolved

__all__ = ["Measured", "measure"]

STEPS, ROWS = 3, 8


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured.

    Args:
        steps: Kind of model -> seconds of an optimizer step.
        sizes: Kind of model -> bytes of a stored state.
        columns: Domain or probe -> seconds of scoring all its rows.
    """

    steps: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    columns: Mapping[str, float] = field(default_factory=dict)


def measure(cells: Sequence[Resolved]) -> Measured:
    """Train a few steps of one cell for every kind of model, score a few rows of every column, and throw it away.

    The first step of every kind is not counted: it is slower than all others.

    Args:
        cells: Those that are to be run.
    """
    steps: dict[str, float] = {}
    sizes: dict[str, int] = {}
    columns: dict[str, float] = {}
    for cell in cells:
        if cell.frozen or cell.keys.model in steps:
            continue
        runner = cell.stage_cache.runner
        runner.build()
        steps[cell.keys.model] = _step_seconds(cell)
        sizes[cell.keys.model] = size_in_bytes(runner.module.adapter.state(runner.module.model))
        for name in runner.data.columns:
            if name not in columns:
                columns[name] = _column_seconds(cell, name)
        del runner.module.model
    return Measured(steps=steps, sizes=sizes, columns=columns)


def _step_seconds(cell: Resolved) -> float:
    runner = cell.stage_cache.runner
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


def _column_seconds(cell: Resolved, name: str) -> float:
    runner = cell.stage_cache.runner
    settings: EvaluationSettings = runner.settings.evaluation
    every = max(1, len(runner.data.columns[name].rows(runner.settings.split)) // ROWS)
    if settings.generation_rows is not None:
        settings = replace(settings, generation_rows=max(1, settings.generation_rows // every))
    few = cast("StreamData", _Few(runner.data, every))
    start = time.perf_counter()
    evaluate(runner.module, few, split=runner.settings.split, settings=settings, columns=[name])
    return every * (time.perf_counter() - start)
