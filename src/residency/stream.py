"""One run: the stages of a stream in order, one fresh Trainer each; finish, evaluate, record, resume."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from residency.checkpointing import History
from residency.data import StreamData
from residency.evaluation import Evaluation, evaluate, means
from residency.module import ContinualModule
from residency.provenance import count_parameters, peak_memory_bytes
from residency.record import RunFolder
from residency.results import build_record
from residency.routing import routing_record
from residency.settings import StreamSettings, check_stream
from residency.stages import check_devices, restore_stage, train_stage
from residency.storage import append_line, load_tree
from residency.trainers import Trainers
from residency.types import Stage
from residency.views import RunInfo, View

__all__ = ["StreamSettings", "check_stream", "train_stream"]


def shared_base(module: ContinualModule, data: StreamData, settings: StreamSettings) -> RunFolder | None:
    """Where the scores of the untrained backbone lie, keyed by everything that decides them."""
    if settings.store is None:
        return None
    parts = {
        "backbone": module.backbone.fingerprint(),
        "data": data.fingerprints(),
        "scorers": {name: domain.scorers for name, domain in data.columns.items()},
        "split": settings.split,
        "evaluation": asdict(settings.evaluation),
        "layout": module.layout,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return RunFolder(settings.store / "evaluations" / key[:32])


def train_stream(
    *,
    module: ContinualModule,
    data: StreamData,
    trainers: Trainers,
    folder: RunFolder,
    settings: StreamSettings,
    config: Mapping[str, Any] | None = None,
    views: Sequence[View] = (),
) -> dict[str, Any]:
    """Train a stream, or go on where an earlier call was stopped.

    Args:
        module: Not yet built.
        data: Domains, probes, order, batch size.
        trainers: Makes the Trainer of each stage.
        folder: Where the record goes.
        settings: Name, seed, evaluation.
        config: The resolved config, written beside the results; must be equal when a run goes on.
        views: What shows the run.

    Returns:
        The record, as in results.json. A complete run is returned without loading anything.

    Raises:
        UserError: What the user can mend; nothing half written stays.
    """
    with folder.locked():
        if config is not None:
            folder.keep_config(config)
        if (done := folder.results()) is not None:
            return done
        check_stream(data)
        check_devices(data, trainers)
        run = _Run(module, data, trainers, folder, settings, views)
        try:
            return run.execute()
        except BaseException as error:
            for view in views:
                view.fail(error)
            raise


class _Run:
    """The steps of `train_stream` over the things it was given."""

    def __init__(
        self,
        module: ContinualModule,
        data: StreamData,
        trainers: Trainers,
        folder: RunFolder,
        settings: StreamSettings,
        views: Sequence[View],
    ) -> None:
        self.module = module
        self.data = data
        self.trainers = trainers
        self.folder = folder
        self.settings = settings
        self.views = views
        self.stages = self._plan()
        self.folders = [folder.stage(0, "base"), *(folder.stage(s.index + 1, s.domain) for s in self.stages)]
        self.records: list[dict[str, Any]] = []

    def _plan(self) -> list[Stage]:
        """Place, steps and batch size of every stage."""
        size, found = self.data.batch_size, []
        for index, name in enumerate(self.data.order):
            rows = len(self.data.domains[name].rows("train"))
            steps = self.trainers.steps(rows=rows, batch_size=size)
            shape = {"steps": steps, "batch_size": size, "stages": len(self.data.order)}
            found.append(Stage(index=index, domain=name, seed=self.settings.seed, **shape))
        return found

    def execute(self) -> dict[str, Any]:
        """All stages that are not complete, then the record."""
        for folder in self.folders:
            record = self.folder.completed(folder)
            if record is None:
                break
            self.records.append(record)
        self.module.build(seed=self.settings.seed)
        info = self._info()
        history = self._trim_history()
        for view in self.views:
            view.start(info, history, [record["means"] for record in self.records])
        if not self.records:
            self._score_base()
        elif len(self.records) > 1:
            restore_stage(self.module, self.folder.load_state(self.folders[len(self.records) - 1]))
        for stage in self.stages[len(self.records) - 1 :]:
            self._stage(stage, info)
        self.module.to(self.trainers.root_device)
        routing = routing_record(self.module, self.data, split=self.settings.split, settings=self.settings.evaluation)
        record = build_record(module=self.module, data=self.data, info=info, stages=self.records, routing=routing)
        self.folder.complete(record)
        for view in self.views:
            view.finish(record)
        return record

    def _info(self) -> RunInfo:
        trainable, total = count_parameters(self.module.model)
        return RunInfo(
            cell=self.settings.cell,
            seed=self.settings.seed,
            axes=self.settings.axes,
            domains=self.data.order,
            probes=list(self.data.probes),
            layout=f"{self.module.layout}: {self.module.layout_reason}",
            trainable=trainable,
            total=total,
            resumed=max(0, len(self.records) - 1),
        )

    def _trim_history(self) -> list[dict[str, Any]]:
        """Drop lines of steps that will be run again."""
        done = len(self.records) - 1
        k = done + 1
        step = 0
        if 0 < k <= len(self.stages):
            folder = self.folders[k]
            if (folder / "state.safetensors").is_file():
                step = self.stages[k - 1].steps
            elif (folder / "checkpoint.safetensors").is_file():
                step = int(load_tree(folder / "checkpoint.safetensors")["global_step"])
        self.folder.trim_history(stage=k, step=step)
        return self.folder.history()

    # -- row 0 --------------------------------------------------------------------------------------------------

    def _score_base(self) -> None:
        """Score the pretrained model; once per backbone and data where runs share a store."""
        shared = shared_base(self.module, self.data, self.settings)
        if shared is not None and (known := shared.completed(shared.path)) is not None:
            scores, facts = shared.scores(shared.path), {**known, "shared": True}
        else:
            with ExitStack() as stack:
                if "reference" in self.module.adapter.provides:
                    stack.enter_context(self.module.adapter.reference(self.module.model))
                scores, seconds = self._evaluate("before training")
            facts = {"stage": 0, "domain": None, "evaluation_seconds": seconds}
            if shared is not None:
                shared.complete_stage(shared.path, scores, facts)
        self._complete(0, scores, {k: v for k, v in facts.items() if k != "means"})

    # -- stages -------------------------------------------------------------------------------------------------

    def _stage(self, stage: Stage, info: RunInfo) -> None:
        """Train (unless that is done), save, score."""
        folder = self.folders[stage.index + 1]
        if (folder / "state.safetensors").is_file():
            facts = restore_stage(self.module, self.folder.load_state(folder))
        else:
            facts = self._train(stage, folder, info)
        scores, seconds = self._evaluate(f"after {stage.domain}")
        facts |= {"evaluation_seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}
        self._complete(stage.index + 1, scores, facts)

    def _train(self, stage: Stage, folder: Path, info: RunInfo) -> dict[str, Any]:
        tree = train_stage(
            module=self.module,
            data=self.data,
            trainers=self.trainers,
            stage=stage,
            folder=folder,
            history=History(
                stage=stage,
                every_n_steps=self.trainers.log_every_n_steps,
                offset=sum(s.steps for s in self.stages[: stage.index]),
                write=self._write_line,
            ),
            observers=[callback for view in self.views for callback in view.callbacks(info, stage)],
            checkpoint_every_n_steps=self.settings.checkpoint_every_n_steps,
        )
        self.folder.save_state(folder, tree)
        return dict(tree["facts"])

    def _write_line(self, line: Mapping[str, Any]) -> None:
        append_line(self.folder.history_path, line)
        for view in self.views:
            view.step(line)

    # -- scores and record --------------------------------------------------------------------------------------

    def _evaluate(self, title: str) -> tuple[Evaluation, float]:
        start = time.perf_counter()
        total = sum(len(d.rows(self.settings.split)) for d in self.data.columns.values())
        self.module.to(self.trainers.root_device)
        with ExitStack() as stack:
            advances = [stack.enter_context(view.evaluating(title, total)) for view in self.views]

            def advance(column: str, rows: int) -> None:
                for one in advances:
                    one(column, rows)

            scores = evaluate(
                self.module,
                self.data,
                split=self.settings.split,
                settings=self.settings.evaluation,
                advance=advance,
            )
        return scores, time.perf_counter() - start

    def _complete(self, k: int, scores: Evaluation, facts: Mapping[str, Any]) -> None:
        self.folder.complete_stage(self.folders[k], scores, facts)
        self.records.append({**facts, "means": means(scores)})
        for view in self.views:
            view.row(k, self.records[-1]["means"])
