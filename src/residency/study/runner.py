"""A study that is being run: search, plan, make what is missing, compare."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from residency.core.errors import EXIT_DONE, EXIT_SOME_FAILED, EXIT_USER, UserError
from residency.core.garbage import without_collector
from residency.core.text import for_terminal
from residency.engine.stage_overrides import describe_stages
from residency.runs.estimate import describe_costs
from residency.runs.estimate_words import Asked
from residency.study.compare import compare, failed_record, told_failure
from residency.study.executors.base import Executor
from residency.study.planning.cells import Cell
from residency.study.planning.estimate import Estimate, describe, estimate
from residency.study.planning.measure import measure
from residency.study.planning.memory import describe_memory
from residency.study.planning.prepare import Prepared, prepare
from residency.study.planning.resolve import Resolved, Resolver
from residency.study.planning.study_file import Study
from residency.study.schedule import Failure, run_tree
from residency.study.views.events import GridCell, StudyGrid, Watcher

__all__ = ["StudyRunner"]

Found = Mapping[str, Mapping[str, Any]]


class StudyRunner:
    """Where a study is made.

    Args:
        study: As `load_study` gives it.
        folder: Its folder.
        store: Where its stages lie.
        console: Where to print.
        workers: Tasks at once, for the estimate.
    """

    def __init__(self, study: Study, *, folder: Path, store: Path, console: Console, workers: int) -> None:
        self.study = study
        self.folder = folder
        self.store = store
        self.console = console
        self.workers = workers
        self.finished: dict[str, Any] | None = None
        """What `study.repeat.keep_finished` keeps once all cells are complete."""

    def check(self, question: Asked) -> None:
        """Plan and show; nothing is written.

        Args:
            question: What is asked besides memory; `measure` tries a few steps of every kind of model.

        Raises:
            UserError: What is wrong with the study or a cell of it.
        """
        search = self.study.search
        if search is not None:
            self._check_space()
            self._say(
                f"search: {search.trials} trials of {', '.join(search.parameters)}, {search.batch} together, for every "
                "combination; the cells below are those before the search"
            )
        self._show(self._prepared({}), question)

    def sweep(self, start: Callable[[], Executor], watchers: Sequence[Watcher]) -> int:
        """Search if the study does, then make its cells, then compare them.

        Args:
            start: Starts the executor; called once, and only if something has to be run.
            watchers: What shows the running study.

        Returns:
            Exit code.
        """
        with ExitStack() as stack:
            running: list[Executor] = []

            def executor() -> Executor:
                if not running:
                    running.append(start())
                    stack.callback(running[0].close)
                return running[0]

            prepared = self._prepared(self._search(executor, watchers))
            found = self._show(prepared)
            prepared.keep()
            failures = _run(prepared, found, executor(), watchers) if prepared.missing else {}
        return self._report(prepared, failures)

    def _search(self, executor: Callable[[], Executor], watchers: Sequence[Watcher]) -> Found:
        """What a search has found, or finds now."""
        if self.study.search is None:
            return {}
        from residency.study.search.search import StudySearch

        return StudySearch(
            self.study,
            folder=self.folder,
            resolver=self._check_space(),
            executor=executor,
            watchers=watchers,
            on_message=self._say,
        ).run()

    def _check_space(self) -> Resolver:
        from residency.study.search.check_space import check_space

        resolver = Resolver(self.study, self.store)
        check_space(self.study, resolver)
        return resolver

    def _prepared(self, found: Found) -> Prepared:
        with without_collector():
            return prepare(self.study, folder=self.folder, store=self.store, found=found)

    @staticmethod
    def _record(prepared: Prepared, cell: Cell) -> dict[str, Any]:
        record = prepared.run(cell).results()
        if record is None:
            raise UserError(
                f"the record of the cell {cell.id} is missing or damaged",
                why="it was complete a moment ago",
                fix="run the same command again: what is damaged is made again",
            )
        return record

    def _say(self, text: str) -> None:
        self.console.print(escape(for_terminal(text)), highlight=False)

    def _show(self, prepared: Prepared, question: Asked | None = None) -> Estimate:
        cells, missing = prepared.cells, {resolved.cell.id for resolved in prepared.missing}
        self.console.print(
            f"[bold]{escape(for_terminal(prepared.study.name))}[/bold]: {len(cells)} cells, {len(missing)} to run, "
            f"{len(cells) - len(missing)} complete in {escape(for_terminal(prepared.folder))}"
        )
        listed = [f"  {escape(cell.id)}  {'to run' if cell.id in missing else 'complete'}" for cell in cells]
        self.console.print("\n".join(listed), highlight=False)
        for line in _own_settings(prepared.missing):
            self._say(f"  {line}")
        tried = measure(prepared.missing) if question and question.measure else None
        found = estimate(prepared.tree, prepared.missing, prepared.store, slots=self.workers, measured=tried)
        lines = describe(prepared.counts, found)
        if question is not None:
            lines += describe_memory(prepared.missing, question)
            worked = None if found.seconds is None else sum(found.tasks.values())
            lines += describe_costs(worked, 1, question)[1:]
        for line in lines:
            self._say(f"  {line}")
        return found

    def _report(self, prepared: Prepared, failures: Mapping[str, Failure]) -> int:
        compared = [cell for cell in prepared.cells if cell.reference is None]
        records: list[dict[str, Any]] = [
            failed_record(cell, failures[cell.id]) if cell.id in failures else self._record(prepared, cell)
            for cell in compared
        ]
        made = compare(prepared.study, prepared.folder, records, self.console)
        if not failures:
            names = {"cells": [cell.id for cell in prepared.cells], "compared": [cell.id for cell in compared]}
            self.finished = None if made is None else {**made, **names, "name": self.study.name}
            return EXIT_DONE
        self.console.print(
            f"{len(failures)} of {len(prepared.cells)} cells failed: {escape(for_terminal(', '.join(failures)))}"
        )
        for message in dict.fromkeys(map(told_failure, failures.values())):
            self._say(f"  {message}")
        mendable = {failure.code for failure in failures.values()} == {EXIT_USER}
        return EXIT_USER if len(failures) == len(prepared.cells) and mendable else EXIT_SOME_FAILED


def _own_settings(missing: Sequence[Resolved]) -> list[str]:
    """What the stages do, where one of them has settings of its own; cells that do the same are named together."""
    found: dict[tuple[str, ...], list[str]] = {}
    for cell in missing:
        runner = cell.stage_cache.runner
        lines = () if runner.settings.frozen else tuple(describe_stages(runner.stages, runner.settings.stages))
        if lines:
            found.setdefault(lines, []).append(cell.cell.id)
    told: list[str] = []
    for lines, cells in found.items():
        others = f" and {len(cells) - 1} more" if cells[1:] else ""
        told += [f"stages of {cells[0]}{others}:", *(f"  {line}" for line in lines)]
    return told


def _run(prepared: Prepared, found: Estimate, executor: Executor, watchers: Sequence[Watcher]) -> dict[str, Failure]:
    grid = _grid(prepared, found, executor.slots)
    threading.Thread(target=_get_ready, name="report").start()
    try:
        for watcher in watchers:
            watcher.start(grid)
        return run_tree(prepared.tree, executor=executor, store=prepared.store, watchers=watchers, seconds=found.tasks)
    finally:
        for watcher in watchers:
            watcher.finish()


def _get_ready() -> None:
    """Import what the report needs, which takes seconds, while this process waits for its workers."""
    # Whoever needs it in vain will say so, in its own time.
    with suppress(Exception):
        import_module("residency.report.page.build")
        from residency.report.page.files import viewer_code

        viewer_code()


def _grid(prepared: Prepared, found: Estimate, slots: int) -> StudyGrid:
    known = {row.id: row for row in prepared.tree.grid}
    rows = []
    for entry in prepared.entries:
        names = tuple(entry["domains"])
        nothing = (None,) * (len(names) + 2)
        complete = GridCell(id=entry["id"], domains=names, tasks=nothing, shared=(False,) * len(nothing))
        rows.append(known.get(entry["id"], complete))
    return StudyGrid(
        name=prepared.study.name,
        folder=str(prepared.folder),
        scorer=prepared.study.scorer,
        cells=tuple(rows),
        titles={task: node.title for task, node in prepared.tree.nodes.items()},
        seconds=found.tasks,
        slots=slots,
    )
