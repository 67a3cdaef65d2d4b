"""The live view is a fold over events: nothing is lost, nothing crashes, names stay text, the terminal is restored."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from residency.study.views.events import Event, GridCell, Kind, StudyGrid
from residency.study.views.live import StudyView
from residency.study.views.screen import StudyState, screen

KINDS: tuple[Kind, ...] = ("submitted", "running", "progress", "done", "failed", "retried", "skipped")


def grid(cells: int = 3, *, name: str = "study", domains: tuple[str, ...] = ("med", "law")) -> StudyGrid:
    """Cells that share row 0 and their first stage, and put a folder together each."""
    rows = []
    for c in range(cells):
        tasks = ("row0", "first", *(f"stage{c}-{k}" for k in range(1, len(domains))), f"record{c}")
        shared = tuple(c > 0 and task in ("row0", "first") for task in tasks)
        rows.append(GridCell(id=f"cell{c}", domains=domains, tasks=tasks, shared=shared))
    titles = {task: f"title of {task}" for row in rows for task in row.tasks if task}
    return StudyGrid(name=name, folder="f", scorer="nll", cells=tuple(rows), titles=titles)


def fold(events: list[Event], **options: int) -> StudyState:
    """The state after some events."""
    state = StudyState(grid=grid(**options))
    for event in events:
        state = state.after(event)
    return state


def shown(state: StudyState, *, width: int = 120, height: int = 40, ascii_only: bool = False) -> str:
    """The screen as text."""
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False, legacy_windows=False)
    console.print(screen(state, height=height, ascii_only=ascii_only))
    return console.file.getvalue()  # type: ignore[attr-defined]


def row(state: StudyState, cell: str) -> list[str]:
    """The words of one row."""
    return next(line.split() for line in shown(state).splitlines() if line.strip().startswith(cell))


def test_one_screen_tells_what_runs_what_is_shared_and_the_scores() -> None:
    state = fold(
        [
            Event(kind="done", task="row0"),
            Event(kind="running", task="first"),
            Event(kind="scores", task="first", means={"nll": {"med": 1.5, "law": 9.0}}),
            Event(kind="done", task="first", left=90.0),
            Event(kind="running", task="stage0-1"),
            Event(kind="progress", task="stage0-1", step=3, steps=12, phase="training"),
            Event(kind="failed", task="stage1-1", message="out of memory"),
            Event(kind="skipped", task="record1", message="needs stage1-1"),
        ]
    )
    assert row(state, "cell0") == ["cell0", "✓", "✓", "1.500", "▶", "train", "25%", "·"]
    assert row(state, "cell1") == ["cell1", "=", "=", "1.500", "✗", "-"]
    assert row(state, "cell2") == ["cell2", "=", "=", "1.500", "·", "·"]
    text = shown(state)
    assert "2 of 8 tasks done, 1 running, 2 failed or left out, about 1:30 left" in text
    assert "title of stage0-1: training 3/12" in text
    assert "title of stage1-1: out of memory" in text
    assert text.splitlines()[1].split() == ["cell", "base", "med", "law", "record"]
    assert shown(state, ascii_only=True).isascii()


def test_the_score_is_the_mean_over_the_domains_learnt_so_far() -> None:
    means = {"nll": {"med": 1.0, "law": 2.0, "probe": 50.0}}
    state = fold([Event(kind="scores", task=task, means=means) for task in ("row0", "first", "stage0-1")])
    cell = state.grid.cells[0]
    assert [state.score(cell, place) for place in range(4)] == [None, 1.0, 1.5, None]


EVENTS = st.builds(
    Event,
    kind=st.sampled_from(KINDS),
    task=st.sampled_from(grid().cells[0].tasks + grid().cells[1].tasks),
    step=st.integers(0, 5),
    steps=st.integers(0, 4),
    phase=st.sampled_from(["training", "scoring", ""]),
    message=st.text(max_size=20),
    left=st.none() | st.floats(0, 1e6),
)


@settings(max_examples=25, deadline=None)
@given(events=st.lists(EVENTS, max_size=25), width=st.integers(1, 120), height=st.integers(1, 30))
def test_every_sequence_of_events_has_a_screen_that_fits(events: list[Event], width: int, height: int) -> None:
    state = fold(events)
    kinds = ("waiting", "running", "retried", "done", "failed", "skipped")
    assert sum(state.count(kind) for kind in kinds) == len(state.tasks) == 8
    lines = shown(state, width=width, height=max(height, 8)).rstrip("\n").split("\n")
    assert len(lines) <= max(height, 8)
    assert all(len(line) <= width for line in lines)


@settings(max_examples=50, deadline=None)
@given(events=st.lists(EVENTS, max_size=25))
def test_the_last_word_on_a_task_counts(events: list[Event]) -> None:
    last = {event.task: event.kind for event in events}
    state = fold(events)
    assert state.count("done") == sum(kind == "done" for kind in last.values())
    assert set(state.progress) <= {task for task, kind in last.items() if kind == "progress"}
    assert state.over == (len(last) == 8 and {*last.values()} <= {"done", "failed", "skipped"})


def test_cells_that_move_are_shown_first_when_there_is_no_room() -> None:
    events = [Event(kind="done", task=f"stage{c}-1") for c in range(20)] + [Event(kind="running", task="record33")]
    text = shown(fold(events, cells=40), height=14)
    assert "cell33" in text
    assert "and 32 more cells" in text
    assert len(text.splitlines()) <= 14


HOSTILE = "[bold]x[/bold] \x1b[31m\n‮[link=http://x]"


@pytest.mark.parametrize("plain", [True, False])
def test_names_from_data_are_text(plain: bool) -> None:
    cell = GridCell(id=HOSTILE, domains=(HOSTILE,), tasks=("a", "b", "c"), shared=(False,) * 3)
    odd = StudyGrid(name=HOSTILE, folder="f", scorer="nll", cells=(cell,), titles={"b": HOSTILE})
    out = io.StringIO()
    view = StudyView(command=HOSTILE, plain=plain, console=Console(file=out, width=300, force_terminal=not plain))
    view.start(odd)
    for kind in KINDS:
        view.event(Event(kind=kind, task="b", message=HOSTILE))
    view.event(Event(kind="scores", task="b", means={"nll": {HOSTILE: 1.0}}))
    view.finish()
    text = out.getvalue()
    assert "[bold]x[/bold]" in text
    assert "‮" not in text
    assert "\x1b[31m" not in text
    if plain:
        assert "\x1b" not in text
        assert all(line.startswith(("[", "stopped")) for line in text.splitlines()), "one event, one line"


@pytest.fixture
def ticking() -> Iterator[list[float]]:
    """A clock that a test moves by hand."""
    return iter([[0.0]]).__next__()  # type: ignore[return-value]


def plain_view(out: io.StringIO, now: list[float]) -> StudyView:
    """A view that writes lines."""
    return StudyView(
        command="residency sweep s.yaml", plain=True, console=Console(file=out, width=200), clock=lambda: now[0]
    )


def test_a_log_has_one_line_per_cell_and_not_every_step(ticking: list[float]) -> None:
    out = io.StringIO()
    view = plain_view(out, ticking)
    view.start(grid(1))
    view.event(Event(kind="running", task="first"))
    for step in range(100):
        ticking[0] += 1.0
        view.event(Event(kind="progress", task="first", step=step, steps=100, phase="training"))
        view.tick()
    view.event(Event(kind="scores", task="first", means={"nll": {"med": 1.25}}))
    for task in ("row0", "first", "stage0-1", "record0"):
        view.event(Event(kind="done", task=task))
    view.finish()
    lines = out.getvalue().splitlines()
    assert lines[0] == "study: 1 cells, 4 tasks, 1 at once"
    assert sum("training" in line for line in lines) == 4, "one in half a minute"
    assert [line for line in lines[1:] if "training" not in line] == ["[4/4] cell0: nll after every stage 1.2500"]


def test_a_log_keeps_what_failed(ticking: list[float]) -> None:
    out = io.StringIO()
    view = plain_view(out, ticking)
    view.start(grid(1))
    view.event(Event(kind="retried", task="first", message="out of memory"))
    view.event(Event(kind="failed", task="first", message="out of memory"))
    view.event(Event(kind="skipped", task="record0", message="first failed"))
    view.finish()
    assert [line.split("] ")[1] for line in out.getvalue().splitlines()[1:4]] == [
        "title of first: to be tried again: out of memory",
        "title of first: failed: out of memory",
        "title of record0: left out: first failed",
    ]


def test_who_stops_early_is_told_how_to_go_on(ticking: list[float]) -> None:
    out = io.StringIO()
    view = plain_view(out, ticking)
    view.start(grid(1))
    view.event(Event(kind="done", task="row0"))
    view.finish()
    view.finish()
    assert out.getvalue().count("stopped: 1 of 4 tasks are done and kept; go on with: residency sweep s.yaml") == 1


def test_the_terminal_is_given_back() -> None:
    out = io.StringIO()
    view = StudyView(command="go", plain=False, console=Console(file=out, force_terminal=True, width=80, height=20))
    view.start(grid())
    view.event(Event(kind="running", task="first"))
    assert out.getvalue().count("\x1b[?25l") == 1, "the cursor is hidden"
    view.finish()
    assert out.getvalue().count("\x1b[?25h") == 1, "the cursor is shown again"
    assert "go on with: go" in out.getvalue()


def test_time_left_runs_down_between_events(ticking: list[float]) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=20)
    view = StudyView(command="go", plain=False, console=console, clock=lambda: ticking[0])
    view.start(grid())
    ticking[0] = 1.0
    view.event(Event(kind="running", task="first", left=100.0))
    assert "1:40 left" in out.getvalue()
    ticking[0] = 41.0
    view.tick()
    assert "1:00 left" in out.getvalue()
    view.finish()
