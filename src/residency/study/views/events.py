"""What a running study tells to whoever watches it: a stream of events over a fixed grid of cells and stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Event", "GridCell", "Kind", "StudyGrid", "Watcher"]

Kind = Literal["submitted", "running", "progress", "done", "failed", "retried", "skipped", "scores"]
"""What happened to a task: `skipped` = something that it needs has failed; `scores` = a row of scores is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GridCell:
    """One cell as a row of a screen.

    Args:
        id: Of the cell.
        domains: Names in learning order, T of them.
        tasks: T + 2 task ids: row 0, every stage, putting the folder together. `None` = nothing has to be done, it is
            there already. Cells that share a stage have the same id at its place.
        shared: T + 2 flags: whether another cell comes first with that task, so that it costs this one nothing.
    """

    id: str
    domains: tuple[str, ...]
    tasks: tuple[str | None, ...]
    shared: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyGrid:
    """All a view has to know before the first event.

    Args:
        name: Of the study.
        folder: Where it lies.
        scorer: Which score it is about.
        cells: Its rows.
        titles: Task id -> what it does, for a human.
        seconds: Task id -> how long it will take, as far as earlier stages tell; may lack tasks.
        slots: Tasks that run at once.
    """

    name: str
    folder: str
    scorer: str
    cells: tuple[GridCell, ...]
    titles: Mapping[str, str]
    seconds: Mapping[str, float] = field(default_factory=dict)
    slots: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened to a task.

    Args:
        kind: What.
        task: Its id.
        step: `progress`: what is done, in `phase`.
        steps: `progress`: of how much.
        phase: `progress`: `training` (steps) or `scoring` (rows).
        message: `failed`, `retried`, `skipped`: why.
        means: `scores`: {scorer: {column: mean}} after the task's stage.
        left: Seconds until the study ends, as far as can be told.
    """

    kind: Kind
    task: str
    step: int = 0
    steps: int = 0
    phase: str = ""
    message: str = ""
    means: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    left: float | None = None


class Watcher:
    """The null watcher; every method may be overridden. Called from the scheduler's thread, never concurrently."""

    def start(self, grid: StudyGrid) -> None:
        """The study is planned and checked; nothing has run yet."""

    def event(self, event: Event) -> None:
        """Something happened. Must return fast."""

    def tick(self) -> None:
        """Called about twice a second while the study runs, for what moves by itself."""

    def finish(self) -> None:
        """The study is over, whatever its end; the terminal is given back. May be called twice."""
