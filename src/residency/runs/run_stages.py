"""The stages of one run in order: what is complete is shown, what is missing is made, then the record is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from residency.core.environment import peak_memory_bytes
from residency.core.tensor_files import append_line, load_whole_tree
from residency.engine.scoring.row_scores import Evaluation, count_rows, means
from residency.engine.serving import served_of, serving
from residency.runs.augmentation import cost_of
from residency.runs.data_check import check_data
from residency.runs.folder import RunFolder
from residency.runs.left_out import after_run, before_run
from residency.runs.results import build_record
from residency.runs.shown_views import finish_views
from residency.runs.stage_cache import StageCache
from residency.runs.stage_runner import StageRunner
from residency.runs.store.store import link_or_copy
from residency.runs.views.base import RunInfo

__all__ = ["RunStages"]


class RunStages:
    """The steps of `train_stream` over the things it was given.

    Args:
        runner: Trains and scores.
        folder: Of the run.
        stage_cache: Where stages are shared; `None` = the run's folder is all there is.
        config: The resolved config, whose digest the records of the stages keep.
    """

    def __init__(
        self,
        runner: StageRunner,
        folder: RunFolder,
        stage_cache: StageCache | None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.runner = runner
        self.config = config
        self.views = runner.views
        self.folder = folder
        self.stage_cache = stage_cache
        self.stages = runner.stages
        self.folders = [folder.stage(0, "base"), *(folder.stage(s.index + 1, s.domain) for s in self.stages)]
        self.records: list[dict[str, Any]] = []

    def execute(self) -> dict[str, Any]:
        """All stages that are not complete, then the record."""
        found = [self._completed(k) for k in range(len(self.folders))]
        self.records = list(takewhile(lambda record: record is not None, found))  # type: ignore[arg-type]
        checked = check_data(self.runner.data, self.runner.module.backbone)
        info = self.info
        before = before_run(self.runner, info.data, checked["domains"])
        checked = {**checked, "left_out": before}
        if augmented := self.runner.data.augmented():
            checked["augmented"] = augmented
        history = self._start_history([folder for folder, record in zip(self.folders, found, strict=True) if record])
        for view in self.views:
            view.start(info, history, [record["means"] for record in self.records])
            view.data(checked)
        for k in range(len(self.records), len(self.folders)):
            if (whole := found[k]) is not None:
                self._show(k, whole)
            else:
                self._make(k)
        self.folder.log.order()
        record = build_record(module=self.runner.module, data=self.runner.data, info=info, stages=self.records)
        record["data"] = {**checked, "left_out": after_run(self.runner, info.data, before, self.records)}
        finish_views(self.folder, self.views, self.folder.complete(record))
        return record

    def _completed(self, k: int) -> dict[str, Any] | None:
        record = self.folder.completed(self.folders[k])
        trained = k and not self.runner.settings.frozen
        if record is not None and trained and not (self.folders[k] / "state.safetensors").is_file():
            self.folder.on_message(f"{self.folders[k]} has no state; the stage is made again")
            return None
        return record

    def _make(self, k: int) -> None:
        facts = self._state(k) if k and not self.runner.settings.frozen else _untrained(k, self.stages)
        scores, more = self._scores(0 if self.runner.settings.frozen else k)
        facts = {**facts, **more}
        if k and not self.runner.settings.frozen:
            facts |= cost_of(self.runner.data.augmented(), self.stages[k - 1].domain)
        self._complete(k, scores, facts | self._look(k, facts))

    def _show(self, k: int, record: dict[str, Any]) -> None:
        """A stage that was complete already, after one that was not."""
        self.records.append(record)
        for view in self.views:
            for line in self.folder.log.of_stage(self.folders[k]):
                view.step(line)
            view.row(k, record["means"])

    @cached_property
    def info(self) -> RunInfo:
        """What views want to know; loads the model unless the store knows its size."""
        facts = self.runner.model_facts() if self.stage_cache is None else self.stage_cache.model()
        return self.runner.info(facts, resumed=max(0, len(self.records) - 1))

    def _start_history(self, complete: Sequence[Path]) -> list[dict[str, Any]]:
        """Drop lines of steps that will be run again; those that views have not shown yet are left out, too."""
        k = len(self.records)
        step = 0
        if 0 < k <= len(self.stages) and self.stage_cache is None:
            folder, told = self.folders[k], self.folder.on_message
            if load_whole_tree(folder / "state.safetensors", on_message=told) is not None:
                step = self.stages[k - 1].steps
            elif (tree := load_whole_tree(folder / "checkpoint.safetensors", on_message=told)) is not None:
                step = int(tree["global_step"])
        return [line for line in self.folder.log.start(complete, stage=k, step=step) if line["stage"] <= k]

    # -- states -------------------------------------------------------------------------------------------------

    def _state(self, k: int) -> dict[str, Any]:
        """See to it that the state after stage k lies in the run's folder; its facts."""
        if self.stage_cache is None:
            return self._own_state(k)
        entry = self.stage_cache.finished(k)
        trained_here = self.runner.trained_here == k
        lines = self.stage_cache.history(k)
        link_or_copy(entry.path / "state.safetensors", self.folders[k] / "state.safetensors")
        self.folder.log.put(k, lines)
        for line in [] if trained_here else lines:
            for view in self.views:
                view.step(line)
        return dict(entry.meta["facts"])

    def _own_state(self, k: int) -> dict[str, Any]:
        folder = self.folders[k]
        if (tree := load_whole_tree(folder / "state.safetensors", on_message=self.folder.on_message)) is not None:
            return dict(tree["facts"])
        if k != len(self.records) or not (folder / "checkpoint.safetensors").is_file():
            self.folder.log.put(k, [])
        self.runner.restore(k - 1, self._load)
        facts = self.runner.train(k, work=folder, write=self._write_line, info=self.info)
        tree = self.runner.finish(k, facts)
        self.folder.save_state(folder, tree)
        return dict(tree["facts"])

    def _load(self, k: int) -> dict[str, Any]:
        return self.folder.load_state(self.folders[k])

    def _write_line(self, line: Mapping[str, Any]) -> None:
        append_line(self.folder.log.path, line)

    # -- scores and record --------------------------------------------------------------------------------------

    def _scores(self, k: int) -> tuple[Evaluation, dict[str, Any]]:
        if self.stage_cache is not None:
            return self.stage_cache.scores(k)
        self.runner.restore(k, self._load)
        scores, cost = self.runner.evaluate([name for name, d in self.runner.data.columns.items() if d.scorers])
        return scores, cost | {"peak_memory_bytes": peak_memory_bytes()}

    def _look(self, k: int, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Inspect the state after stage k; nothing is loaded for it unless somebody looks."""
        runner = self.runner
        if not runner.inspection.looks_at_states or (k and runner.settings.frozen):
            return {}
        runner.restore(k, self._load)
        runner.module.to(runner.trainers.root_device)

        where: dict[str, Any] = {
            "k": k,
            "seed": runner.settings.seed,
            "states": lambda stage: served_of(self._load(stage)),
        }
        with serving(runner.module):
            return runner.inspection.after_stage(runner.module, runner.data, **where, facts=facts)

    def _complete(self, k: int, scores: Evaluation, facts: Mapping[str, Any]) -> None:
        self.folder.complete_stage(self.folders[k], scores, facts, config=self.config)
        self.records.append({**facts, "means": means(scores), **count_rows(scores)})
        for view in self.views:
            view.row(k, self.records[-1]["means"])


def _untrained(k: int, stages: Sequence[Any]) -> dict[str, Any]:
    """The facts of row 0, and of the stages of a frozen run."""
    facts: dict[str, Any] = {"stage": k, "domain": stages[k - 1].domain if k else None}
    nothing = {"train_seconds": 0.0, "train_tokens": 0, "steps": 0, "mitigation_state_bytes": {}, "weights": {}}
    return facts | (nothing if k else {})
