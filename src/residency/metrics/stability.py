"""Comparing how steady gradients were in two runs, which means something only if both were clipped alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from residency.errors import UserError

__all__ = ["GradientTrace", "maximum_reduction"]


@dataclass(frozen=True, kw_only=True)
class GradientTrace:
    """Gradient norms of a run, and what was done to the gradients.

    Args:
        norms: Of the whole gradient before clipping, one per optimizer step.
        clipper: Everything that limits gradients, by name: threshold, algorithm, statistics, ...; `{}` = nothing.
    """

    norms: Sequence[float]
    clipper: Mapping[str, Any] = field(default_factory=dict)


def maximum_reduction(run: GradientTrace, baseline: GradientTrace) -> float:
    """1 - max(run) / max(baseline): by which share the largest gradient norm is smaller.

    Raises:
        UserError: The runs were clipped differently, or differ in length: a clipper keeps the weights away from where
            gradients explode, so the difference could be all its own.
    """
    if dict(run.clipper) != dict(baseline.clipper) or len(run.norms) != len(baseline.norms) or not run.norms:
        raise UserError(
            f"gradients of {len(run.norms)} steps clipped by {dict(run.clipper) or 'nothing'} against "
            f"{len(baseline.norms)} steps clipped by {dict(baseline.clipper) or 'nothing'}",
            why="the comparison would show what the clipper does, not what the method does",
            fix="run both with the same clipping and the same number of steps",
        )
    return 1 - max(run.norms) / max(baseline.norms)
