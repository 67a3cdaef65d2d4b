"""The live view of a running study; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from residency.core.text import printable
from residency.runs.views.progress import clock_time, no_terminal
from residency.study.views.events import Event, StudyGrid, Watcher
from residency.study.views.screen import AFTER, LONGEST, WORDS, StudyState, screen, title_of

__all__ = ["StudyView"]

_LIVE_SECONDS, _PLAIN_SECONDS = 0.25, 30.0


class StudyView(Watcher):
    """Shows a study while it runs.

    Args:
        command: What goes on with the study, told if it ends early.
        plain: Lines instead of a screen; `None` = where standard output or standard error is no terminal.
        console: Where to draw; standard error by default.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        *,
        command: str,
        plain: bool | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.command = command
        self.plain = no_terminal() if plain is None else plain
        self.console = console or Console(stderr=True)
        self.clock = clock
        self.state: StudyState | None = None
        self._live: Live | None = None
        self._drawn = -float("inf")
        self._told = 0.0  # when the time left was told

    def start(self, grid: StudyGrid) -> None:
        """The first screen, or one line on what there is to do."""
        self.state = StudyState(grid=grid)
        self._told = self.clock()
        if self.plain:
            tasks = len(self.state.tasks)
            estimate = sum(grid.seconds.values()) / max(1, grid.slots)
            about = f", about {clock_time(estimate)}" if estimate else ""
            self._print(f"{grid.name}: {len(grid.cells)} cells, {tasks} tasks, {grid.slots} at once{about}")
            return
        self._live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")
        self._live.start()
        self._draw()

    def event(self, event: Event) -> None:
        """Take note; draw if it is time."""
        if self.state is None:
            return
        self.state = self.state.after(event)
        if event.left is not None:
            self._told = self.clock()
        if self.plain:
            self._line(self.state, event)
        else:
            self.tick()

    def tick(self) -> None:
        """Draw if it is time."""
        if self._live is not None and self.clock() - self._drawn >= _LIVE_SECONDS:
            self._draw()

    def finish(self) -> None:
        """The last screen stays; if the study is not over, how to go on."""
        live, self._live = self._live, None
        state, self.state = self.state, None
        if live is not None and state is not None:
            live.update(screen(state, height=self.console.height, ascii_only=self._ascii), refresh=True)
            live.stop()
        if state is not None and not state.over:
            done = state.count("done")
            self._print(f"stopped: {done} of {len(state.tasks)} tasks are done and kept; go on with: {self.command}")

    @property
    def _ascii(self) -> bool:
        return self.console.options.ascii_only

    def _draw(self) -> None:
        assert self._live is not None
        assert self.state is not None
        self._drawn = self.clock()
        left = None if self.state.left is None else max(0.0, self.state.left - (self._drawn - self._told))
        height = self.console.height
        self._live.update(screen(self.state, height=height, left=left, ascii_only=self._ascii), refresh=True)

    def _line(self, state: StudyState, event: Event) -> None:
        """What a log shall keep: one line per cell, every failure, and now and then how far a task is."""
        done = f"[{state.count('done')}/{len(state.tasks)}]"
        title = title_of(state, event.task)
        if event.kind in ("failed", "retried", "skipped"):
            message = f": {event.message}" if event.message else ""
            self._print(f"{done} {title}: {WORDS.get(AFTER[event.kind], event.kind)}{message}{self._left(state)}")
        elif event.kind == "done":
            for cell in (cell for cell in state.grid.cells if cell.tasks[-1] == event.task):
                scores = [state.score(cell, place) for place in range(1, len(cell.domains) + 1)]
                known = [f"{score:.4f}" for score in scores if score is not None]
                told = f": {state.grid.scorer} after every stage {', '.join(known)}" if known else ": complete"
                self._print(f"{done} {cell.id}{told}{self._left(state)}")
        elif event.kind == "progress" and self.clock() - self._drawn >= _PLAIN_SECONDS:
            self._drawn = self.clock()
            self._print(f"{done} {title}: {event.phase} {event.step:,}/{event.steps:,}{self._left(state)}")

    @staticmethod
    def _left(state: StudyState) -> str:
        return "" if state.left is None or state.over else f" (about {clock_time(state.left)} left)"

    def _print(self, text: str) -> None:
        self.console.print(Text(printable(text, LONGEST)), soft_wrap=True)
