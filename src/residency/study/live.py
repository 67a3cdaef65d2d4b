"""A running study on one screen: cells down, stages across; plain lines where there is no terminal.

What is shown is a pure function of the events so far (`StudyState`); names from configs and data are text, never markup.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from residency.progress import clock_time, no_terminal
from residency.report.tables import printable
from residency.study.events import Event, GridCell, StudyGrid, Watcher

__all__ = ["State", "StudyState", "StudyView", "screen"]

State = Literal["there", "waiting", "running", "retried", "done", "shared", "failed", "skipped"]
"""Of one stage of one cell. `there` = before this call; `shared` = another cell has paid for it."""

_LIVE_SECONDS, _PLAIN_SECONDS = 0.25, 30.0
_LONGEST = 400  # characters of a line, messages of libraries included
_AFTER: Mapping[str, State] = {
    "submitted": "waiting",
    "running": "running",
    "progress": "running",
    "done": "done",
    "failed": "failed",
    "retried": "retried",
    "skipped": "skipped",
}
# Shapes differ as well as colours (Okabe and Ito): neither a colour-blind reader nor a copied text loses anything.
_LOOK: Mapping[State, tuple[str, str, str]] = {
    "there": ("✓", "v", "dim"),
    "waiting": ("·", ".", "dim"),
    "running": ("▶", ">", "bold #56B4E9"),
    "retried": ("↻", "r", "#E69F00"),
    "done": ("✓", "v", "#009E73"),
    "shared": ("=", "=", "#009E73"),
    "failed": ("✗", "x", "bold #D55E00"),
    "skipped": ("-", "-", "#D55E00"),
}
_WORDS: Mapping[State, str] = {"there": "there before", "skipped": "left out", "retried": "to be tried again"}


@dataclass(frozen=True, kw_only=True)
class StudyState:
    """What is known of a study after some of its events.

    Args:
        grid: Cells and stages.
        states: Task id -> state; a task that is not in it waits.
        progress: Task id -> the latest `progress` event, while it runs.
        scores: Task id -> {scorer: {column: mean}}.
        messages: Task id -> why it failed, is tried again or left out.
        left: Seconds to the end, as last told.
    """

    grid: StudyGrid
    states: Mapping[str, State] = field(default_factory=dict)
    progress: Mapping[str, Event] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    messages: Mapping[str, str] = field(default_factory=dict)
    left: float | None = None

    def after(self, event: Event) -> StudyState:
        """The state after one more event."""
        told = self if event.left is None else replace(self, left=event.left)
        if event.kind == "scores":
            return replace(told, scores={**self.scores, event.task: event.means})
        progress = {task: last for task, last in self.progress.items() if task != event.task}
        if event.kind == "progress":
            progress[event.task] = event
        messages = {**self.messages, event.task: event.message} if event.message else self.messages
        states = {**self.states, event.task: _AFTER[event.kind]}
        return replace(told, states=states, progress=progress, messages=messages)

    @property
    def tasks(self) -> list[str]:
        """Every task of the study once, in the order of the cells."""
        return list(dict.fromkeys(task for cell in self.grid.cells for task in cell.tasks if task is not None))

    def of(self, cell: GridCell, place: int) -> State:
        """The state at one place of the screen."""
        task = cell.tasks[place]
        if task is None:
            return "shared" if cell.shared[place] else "there"
        state = self.states.get(task, "waiting")
        return "shared" if state == "done" and cell.shared[place] else state

    def score(self, cell: GridCell, place: int) -> float | None:
        """Mean score after a stage over the domains learnt so far; `None` before training or where it is not known."""
        means = self.scores.get(cell.tasks[place] or "", {}).get(self.grid.scorer, {})
        seen = [means[domain] for domain in cell.domains[:place] if domain in means]
        return sum(seen) / len(seen) if seen and len(seen) == place else None

    def count(self, *states: State) -> int:
        """Tasks in one of these states."""
        return sum(self.states.get(task, "waiting") in states for task in self.tasks)

    @property
    def over(self) -> bool:
        """Whether every task has ended."""
        return self.count("done", "failed", "skipped") == len(self.tasks)


def screen(
    state: StudyState, *, height: int = 40, left: float | None = None, ascii_only: bool = False
) -> RenderableType:
    """One screen.

    Args:
        state: What is known.
        height: Lines there are.
        left: Seconds to the end; that of the state by default.
        ascii_only: Without symbols that some terminals cannot show.
    """
    running = [task for task in state.tasks if state.states.get(task) == "running"]
    below = [_running_line(state, task) for task in running[: max(1, height // 4)]]
    troubles = [(task, text) for task, text in state.messages.items() if state.states.get(task) != "done"][-2:]
    below += [_text(f"{_title(state, task)}: {text}", "#D55E00") for task, text in troubles]
    # Headline, titles, one cell, what is hidden, legend and the line of the cursor always have a place.
    below = below[: max(0, height - 6)]
    room = max(1, height - len(below) - 5)
    shown = _most_telling(state, room)
    rest = [cell for cell in state.grid.cells if cell not in shown]
    table = Table(box=None, padding=(0, 1), show_edge=False, header_style="bold")
    table.add_column("cell", no_wrap=True, overflow="ellipsis", max_width=40)
    for title in _columns(state.grid):
        table.add_column(Text(title), justify="left", no_wrap=True, overflow="ellipsis", max_width=14)
    for cell in shown:
        places = (_place(state, cell, place, ascii_only) for place in range(len(cell.tasks)))
        table.add_row(Text(printable(cell.id)), *places)
    hidden = [_text(f"... and {len(rest)} more cells", "dim")] if rest else []
    return Group(_headline(state, left), table, *hidden, *below, _legend(ascii_only))


def _headline(state: StudyState, left: float | None) -> Text:
    done, total, failed = state.count("done"), len(state.tasks), state.count("failed", "skipped")
    line = Text(printable(state.grid.name), style="bold", no_wrap=True, overflow="ellipsis")
    line.append(f"  {done} of {total} tasks done, {state.count('running')} running", style="not bold")
    if failed:
        line.append(f", {failed} failed or left out", style="not bold #D55E00")
    seconds = state.left if left is None else left
    if seconds is not None and not state.over:
        line.append(f", about {clock_time(seconds)} left", style="not bold")
    return line


def _columns(grid: StudyGrid) -> list[str]:
    """Titles above row 0, the stages and the record; the domains' names if all cells have the same order."""
    longest = max((len(cell.domains) for cell in grid.cells), default=0)
    orders = {cell.domains for cell in grid.cells}
    names = [printable(name) for name in next(iter(orders))] if len(orders) == 1 else []
    return ["base", *(names or [f"stage {k + 1}" for k in range(longest)]), "record"]


def _place(state: StudyState, cell: GridCell, place: int, ascii_only: bool) -> Text:
    kind = state.of(cell, place)
    symbol, plain, style = _LOOK[kind]
    text = Text(plain if ascii_only else symbol, style=style)
    last = state.progress.get(cell.tasks[place] or "")
    if kind == "running" and last is not None and last.steps:
        text.append(f" {last.phase[:5]} {min(1.0, last.step / last.steps):.0%}")
    elif (score := state.score(cell, place)) is not None:
        text.append(f" {score:.3f}")
    return text


def _running_line(state: StudyState, task: str) -> Text:
    last = state.progress.get(task)
    facts = f": {last.phase} {last.step:,}/{last.steps:,}" if last is not None and last.steps else ""
    return _text(f"{_title(state, task)}{facts}", "#56B4E9")


def _title(state: StudyState, task: str) -> str:
    return printable(state.grid.titles.get(task, task))


def _text(text: str, style: str) -> Text:
    return Text(printable(text, _LONGEST), style=style, no_wrap=True, overflow="ellipsis")


def _most_telling(state: StudyState, room: int) -> list[GridCell]:
    """The cells that fit on the screen, in their order: those that move or fail before those that wait or are done."""
    cells = state.grid.cells
    if len(cells) <= room:
        return list(cells)

    def rank(index: int) -> tuple[int, int]:
        kinds = {state.of(cells[index], place) for place in range(len(cells[index].tasks))}
        order: tuple[set[State], ...] = ({"running"}, {"failed", "retried", "skipped"}, {"waiting"})
        return next((i for i, group in enumerate(order) if kinds & group), len(order)), index

    return [cells[index] for index in sorted(sorted(range(len(cells)), key=rank)[:room])]


def _legend(ascii_only: bool) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    for state, (symbol, plain, style) in _LOOK.items():
        if state != "there":
            line.append(f"{plain if ascii_only else symbol} ", style=style)
            line.append(f"{_WORDS.get(state, state)}  ", style="dim")
    line.append("Ctrl-C stops cleanly", style="dim")
    return line


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
        """What a log shall keep: every end and every failure; beginnings and progress only now and then."""
        done = f"[{state.count('done')}/{len(state.tasks)}]"
        title = _title(state, event.task)
        if event.kind in ("running", "done", "failed", "retried", "skipped"):
            message = f": {event.message}" if event.message else ""
            self._print(f"{done} {title}: {_WORDS.get(_AFTER[event.kind], event.kind)}{message}{self._left(state)}")
        elif event.kind == "scores":
            for cell in state.grid.cells:
                for place in (k for k, task in enumerate(cell.tasks) if task == event.task):
                    if (score := state.score(cell, place)) is not None:
                        self._print(
                            f"{done} {cell.id} after {cell.domains[place - 1]}: {state.grid.scorer} {score:.4f}"
                        )
        elif event.kind == "progress" and self.clock() - self._drawn >= _PLAIN_SECONDS:
            self._drawn = self.clock()
            self._print(f"{done} {title}: {event.phase} {event.step:,}/{event.steps:,}{self._left(state)}")

    @staticmethod
    def _left(state: StudyState) -> str:
        return "" if state.left is None or state.over else f" (about {clock_time(state.left)} left)"

    def _print(self, text: str) -> None:
        self.console.print(Text(printable(text, _LONGEST)), soft_wrap=True)
