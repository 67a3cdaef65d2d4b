"""Adaptive search: trials are cells on validation rows, drawn in batches, stopped only between stages.

Every combination of the axes is searched on its own, with the same number of trials; all combinations take their
batches together, so that their trials share stages and workers. The test rows are not read here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residency.core.errors import UserError
from residency.core.tensor_files import write_json
from residency.runs.folder import RunFolder
from residency.runs.keys import digest
from residency.runs.store.store import Store
from residency.study.executors.base import Executor
from residency.study.planning.cells import Cell, Combination, combinations, make_cell
from residency.study.planning.resolve import Resolved, Resolver
from residency.study.planning.search_space import Search, survivors, value_of
from residency.study.planning.study_file import Study
from residency.study.planning.tree import build_tree
from residency.study.schedule import Failure, run_tree
from residency.study.search.check_space import VALIDATION, parameters_of
from residency.study.search.trial_records import rows_so_far, stopped_record, upto
from residency.study.search.trials import Trial, Trials
from residency.study.views.events import StudyGrid, Watcher

__all__ = ["StudySearch"]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One trial that is being run, with a cell for each of its seeds."""

    place: int  # of its combination
    trial: Trial
    cells: tuple[Resolved, ...]


class StudySearch:
    """The searches of a study.

    Args:
        study: With a search section.
        folder: Of the study; everything lies in its folder `search`.
        resolver: Parses cells.
        executor: Gives what runs their stages; asked only if something has to be run.
        watchers: What shows them.
        on_message: Called with a sentence when something is known.
    """

    def __init__(
        self,
        study: Study,
        *,
        folder: Path,
        resolver: Resolver,
        executor: Callable[[], Executor],
        watchers: Sequence[Watcher] = (),
        on_message: Callable[[str], None] = lambda text: None,
    ) -> None:
        assert study.search is not None
        self.study = study
        self.search: Search = study.search
        self.folder = folder / "search"
        self.resolver = resolver
        self.store = Store(resolver.store)
        self.executor = executor
        self.watchers = watchers
        self.on_message = on_message
        self.scorer = self.search.scorer or study.scorer
        self.combinations = [c for c in combinations(study) if parameters_of(self.search, c)]
        self.trials = [self._trials(combination) for combination in self.combinations]
        # Numbers of trials are used again by a search that was changed; folders are not.
        self.cells = self.folder / f"cells-{digest([trials.name for trials in self.trials])[:12]}"
        self.failures: dict[str, Failure] = {}

    def _trials(self, combination: Combination) -> Trials:
        parameters = parameters_of(self.search, combination)
        plain = self.resolver.config(self._cell(combination, None, self.search.seeds[0]))
        # A search that is asked for more trials goes on; one with anything else changed is another search.
        asked = {key: value for key, value in vars(self.search).items() if key not in ("trials", "parameters")}
        name = "-".join([*combination.axes.values(), digest(asked, parameters, plain)[:12]])
        path, place = self.folder / "journal.jsonl", combination.name
        return Trials(path=path, name=name, place=place, search=self.search, parameters=parameters)

    def _cell(self, combination: Combination, trial: Trial | None, seed: int) -> Cell:
        keys = [*combination.keys, *([] if trial is None else [trial.keys])]
        axes = {**combination.axes, "trial": "plain" if trial is None else f"{trial.number:03d}"}
        return make_cell(self.study, axes, keys, seed, last=VALIDATION)

    def _run_folder(self, cell: Resolved) -> RunFolder:
        return RunFolder(self.cells / cell.cell.id)

    # -- running --------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Mapping[str, Any]]:
        """Search, or go on searching.

        Returns:
            {combination, as `Combination.name`: the best overrides}.

        Raises:
            UserError: A config that was drawn is refused, or no trial of a combination could be finished.
        """
        for first in range(0, self.search.trials, self.search.batch):
            batches = [trials.batch(first) for trials in self.trials]
            if any(trial.status == "running" for batch in batches for trial in batch):
                self._batch(first, batches)
                self._keep()
        return {c.name: self._best(c, trials) for c, trials in zip(self.combinations, self.trials, strict=True)}

    def _best(self, combination: Combination, trials: Trials) -> Mapping[str, Any]:
        best = trials.best()
        where = ", ".join(combination.axes.values()) or self.study.name
        if best is None:
            reasons = list(dict.fromkeys(failure.message for failure in self.failures.values()))
            raise UserError(
                f"search: no trial of {where} was finished" + (f"; {reasons[0]}" if reasons else ""),
                why="there is no value to run the study's cells with",
                fix="correct what the trials report, or the ranges of search.parameters",
            )
        ends = [trial.status for trial in trials.all()]
        counts = ", ".join(f"{ends.count(status)} {status}" for status in dict.fromkeys(ends))
        values = ", ".join(f"{key} {value}" for key, value in best.keys.items())
        self.on_message(
            f"search, {where}: {self.search.metric} {best.value:.4f} with {values} (trial {best.number}; {counts})"
        )
        return best.keys

    def _batch(self, first: int, batches: Sequence[Sequence[Trial]]) -> None:
        """Train and judge the trials of one batch of every combination."""
        jobs = [
            _Job(place=place, trial=trial, cells=self._resolve(self.combinations[place], trial))
            for place, batch in enumerate(batches)
            for trial in batch
            if trial.status == "running"
        ]
        self.resolver.keep_rows()
        stages = max(len(cell.keys.stages) for job in jobs for cell in job.cells)
        stop = self.search.stop
        for stage in range(stop.after, stages) if stop is not None else ():
            self._run(jobs, stage, f"trials from {first:03d}, stage {stage} of {stages}")
            jobs = self._stop(jobs, stage, first)
        self._run(jobs, None, f"trials from {first:03d}")
        for job in jobs:
            value = self._value(job, None)
            self.trials[job.place].tell(job.trial.number, "failed" if value is None else "done", value)

    def _resolve(self, combination: Combination, trial: Trial) -> tuple[Resolved, ...]:
        cells = []
        for seed in self.search.seeds:
            resolved = self.resolver.resolve(self._cell(combination, trial, seed))
            self._run_folder(resolved).keep_config(resolved.config)
            cells.append(resolved)
        return tuple(cells)

    def _run(self, jobs: Sequence[_Job], stage: int | None, title: str) -> None:
        """Bring jobs to a stage, or to their end."""
        cells = [cell for job in jobs for cell in job.cells if self._run_folder(cell).results() is None]
        tree = build_tree(
            cells, study=self.study.name, folder=self.cells, store=self.store, status=self.folder / "status"
        )
        tree = tree if stage is None else upto(tree, stage)
        if not tree.nodes:
            return
        executor = self.executor()
        grid = StudyGrid(
            name=f"{self.study.name}: {title}",
            folder=str(self.folder),
            scorer=self.scorer,
            cells=tuple(tree.grid),
            titles={task: node.title for task, node in tree.nodes.items()},
            slots=executor.slots,
        )
        try:
            for watcher in self.watchers:
                watcher.start(grid)
            self.failures |= run_tree(tree, executor=executor, store=self.store, watchers=self.watchers)
        finally:
            for watcher in self.watchers:
                watcher.finish()

    # -- judging --------------------------------------------------------------------------------------------------

    def _stop(self, jobs: Sequence[_Job], stage: int, first: int) -> list[_Job]:
        """End the jobs that are behind after a stage, each compared within its combination."""
        stop = self.search.stop
        assert stop is not None
        left: list[_Job] = []
        for place, trials in enumerate(self.trials):
            mine = [job for job in jobs if job.place == place]
            for job in mine:
                trials.report(job.trial.number, stage, self._value(job, stage))
            # From the journal, so that a search that goes on after a kill decides as it would have done.
            known = {trial.number: trial.after.get(stage) for trial in trials.all()}
            batch: dict[int, float | None] = {n: v for n, v in known.items() if n >= first and v is not None}
            batch |= {job.trial.number: known[job.trial.number] for job in mine}
            earlier = [value for number, value in known.items() if number < first and value is not None]
            on = survivors(batch, earlier, keep=stop.keep, sign=self.search.sign)
            for job in mine:
                if job.trial.number in on:
                    left.append(job)
                    continue
                for cell in job.cells:
                    write_json(self._run_folder(cell).path / "results.json", stopped_record(cell, stage))
                trials.tell(job.trial.number, "stopped")
        return left

    def _value(self, job: _Job, stage: int | None) -> float | None:
        """Mean over the seeds; `None` if one of them failed."""
        if any(cell.cell.id in self.failures for cell in job.cells):
            return None
        values = []
        for cell in job.cells:
            columns = cell.stage_cache.runner.data.columns.values()
            scorer = next(d.scorers[self.scorer] for d in columns if self.scorer in d.scorers)
            rows = rows_so_far(cell, len(cell.keys.stages) if stage is None else stage)
            matrix = [[row.get(self.scorer, {}).get(name) for name in cell.domains] for row in rows]
            values.append(value_of(self.search, matrix, higher_is_better=scorer.higher_is_better))
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None

    def _keep(self) -> None:
        """`search/trials.json`: every trial so far, for people and notebooks; the journal is the truth."""
        listed = [
            {
                "axes": dict(combination.axes),
                "trial": trial.number,
                "status": trial.status,
                "value": trial.value,
                "after": {str(stage): value for stage, value in trial.after.items()},
                "parameters": dict(trial.keys),
                "cells": [self._cell(combination, trial, seed).id for seed in self.search.seeds],
            }
            for combination, trials in zip(self.combinations, self.trials, strict=True)
            for trial in trials.all()
        ]
        facts = {"metric": self.search.metric, "direction": self.search.towards, "scorer": self.scorer}
        write_json(self.folder / "trials.json", {**facts, "split": "validation", "trials": listed})
