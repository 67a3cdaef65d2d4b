"""One screen of a running study: cells down, stages across.

What is shown is a pure function of the events so far; names from configs and data are text, never markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from residency.core.text import printable
from residency.runs.views.progress import clock_time
from residency.study.views.events import Event, GridCell, StudyGrid

__all__ = ["AFTER", "LONGEST", "WORDS", "State", "StudyState", "screen", "title_of"]

State = Literal["there", "waiting", "running", "retried", "done", "shared", "failed", "skipped"]
"""Of one stage of one cell. `there` = before this call; `shared` = another cell has paid for it."""

LONGEST = 400  # characters of a line, messages of libraries included
AFTER: Mapping[str, State] = {
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
WORDS: Mapping[State, str] = {"there": "there before", "skipped": "left out", "retried": "to be tried again"}


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
        states = {**self.states, event.task: AFTER[event.kind]}
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
    below += [_text(f"{title_of(state, task)}: {text}", "#D55E00") for task, text in troubles]
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
    return _text(f"{title_of(state, task)}{facts}", "#56B4E9")


def title_of(state: StudyState, task: str) -> str:
    """What a task does, on one line."""
    return printable(state.grid.titles.get(task, task))


def _text(text: str, style: str) -> Text:
    return Text(printable(text, LONGEST), style=style, no_wrap=True, overflow="ellipsis")


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
            line.append(f"{WORDS.get(state, state)}  ", style="dim")
    line.append("Ctrl-C stops cleanly", style="dim")
    return line
