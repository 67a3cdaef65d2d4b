"""What watches a run: a view never changes it, and everything it shows can be rebuilt from the record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback

from residency.core.types import Stage
from residency.domains.token_counts import TokenCounts

__all__ = ["RunInfo", "View"]


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a view may want to say at the start.

    Args:
        cell: Name of the run.
        seed: Its seed.
        axes: Its place in a study, `{}` for a single run.
        domains: Names in learning order.
        probes: Names of what is only evaluated.
        layout: `packed` or `padded`, and why.
        trainable: Number of parameters that move.
        total: Number of parameters.
        resumed: Stages that were complete before this call.
        split: Rows that are scored.
        data: {column: {split: what became of its rows and tokens}}.
        stages: What each stage does, in words, where one of them has settings of its own.
        growth: {mitigation: bytes by which its state grows with every stage}, of those without a bound.
        notices: What else somebody who compares this run with another one should know, in sentences.
    """

    cell: str
    seed: int
    axes: Mapping[str, Any]
    domains: list[str]
    probes: list[str]
    layout: str
    trainable: int
    total: int
    resumed: int
    split: str = "test"
    data: Mapping[str, Mapping[str, TokenCounts]] = field(default_factory=dict)
    stages: Sequence[str] = ()
    growth: Mapping[str, int] = field(default_factory=dict)
    notices: Sequence[str] = ()


class View:
    """The null view; every method may be overridden."""

    keeps = False
    """Whether it leaves something behind that is made again when it is missing."""

    @property
    def name(self) -> str:
        """What the record of the run's views calls it."""
        return type(self).__name__

    def is_there(self) -> bool:
        """Whether what it has left behind is still there; asked of a run that it has shown to its end."""
        return True

    def start(self, info: RunInfo, history: list[dict[str, Any]], rows: list[Mapping[str, Any]]) -> None:
        """A run begins or goes on; `history` and `rows` hold what an earlier call has done."""

    def data(self, checked: Mapping[str, Any]) -> None:
        """What the check of the data counted and found, as in results.json."""

    def callbacks(self, info: RunInfo, stage: Stage) -> list[Callback]:
        """Observers for the Trainer of one stage."""
        return []

    def step(self, line: Mapping[str, Any]) -> None:
        """A line of the history."""

    @contextmanager
    def evaluating(self, title: str, total: int) -> Iterator[Callable[[str, int], None]]:
        """Around an evaluation of `total` rows; yields `advance(column, rows)`."""
        yield lambda column, rows: None

    def row(self, k: int, means: Mapping[str, Mapping[str, float]]) -> None:
        """Row k of the score matrices is known (0 = before training)."""

    def finish(self, record: Mapping[str, Any]) -> None:
        """The run is complete."""

    def fail(self, error: BaseException) -> None:
        """The run stopped before it was complete."""
