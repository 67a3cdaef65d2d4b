"""A running study as plain lines: for logs, and wherever there is no terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape

from residency.report.tables import printable
from residency.study.estimate import duration
from residency.study.events import Event, StudyGrid, Watcher

__all__ = ["PlainLines"]


class PlainLines(Watcher):
    """One line when a task starts, ends or fails.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._grid: StudyGrid | None = None
        self._since: dict[str, float] = {}
        self._ended = 0

    def start(self, grid: StudyGrid) -> None:
        """Remember the titles."""
        self._grid = grid

    def event(self, event: Event) -> None:
        """Print what matters."""
        assert self._grid is not None
        title = escape(printable(self._grid.titles[event.task], 70))
        total = len(self._grid.titles)
        if event.kind == "running":
            self._since[event.task] = time.monotonic()
        elif event.kind == "done":
            self._ended += 1
            taken = time.monotonic() - self._since.get(event.task, time.monotonic())
            left = "" if event.left is None else f", about {duration(event.left)} left"
            if not event.task.startswith("cell-"):
                self.console.print(f"  {self._ended}/{total} {title}: done in {duration(taken)}{left}", highlight=False)
        elif event.kind == "scores":
            self.console.print(f"    {self._scores(event)}", highlight=False)
        elif event.kind in ("failed", "retried"):
            word = "failed" if event.kind == "failed" else "is tried again"
            self.console.print(f"  {title} {word}: {escape(event.message)}", highlight=False)

    def _scores(self, event: Event) -> str:
        assert self._grid is not None
        means = event.means.get(self._grid.scorer, {})
        return escape(f"{self._grid.scorer}: " + ", ".join(f"{printable(c, 20)} {v:.4f}" for c, v in means.items()))
