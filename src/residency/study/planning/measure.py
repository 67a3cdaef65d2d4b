"""A few steps and a few rows: time and disk of a plan, before anything comparable is in the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from residency.core.tensors import size_in_bytes
from residency.runs.trial import column_seconds, step_seconds
from residency.study.planning.resolve import Resolved

__all__ = ["Measured", "measure"]


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
        steps[cell.keys.model] = step_seconds(runner)
        sizes[cell.keys.model] = size_in_bytes(runner.module.adapter.state(runner.module.model))
        for name in runner.data.columns:
            if name not in columns:
                columns[name] = column_seconds(runner, name)
        del runner.module.model
    return Measured(steps=steps, sizes=sizes, columns=columns)
