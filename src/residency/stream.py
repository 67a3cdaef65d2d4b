"""One run: the stages of a stream in order, one fresh Trainer each; finish, evaluate, record, resume."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from residency.checkpointing import History, StageCheckpoint, append_line
from residency.data import StreamData
from residency.domains.sampler import StageBatches
from residency.errors import UserError
from residency.evaluation import Evaluation, EvaluationSettings, evaluate, means
from residency.module import ContinualModule
from residency.provenance import count_parameters, peak_memory_bytes
from residency.record import RunFolder
from residency.results import build_record
from residency.scorers import check_scorers
from residency.storage import load_tree
from residency.trainers import Trainers, quiet_lightning
from residency.types import Split, Stage
from residency.views import RunInfo, View

__all__ = ["StreamSettings", "check_stream", "train_stream"]


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """What a run is apart from model and data.

    Args:
        cell: Name of the run.
        seed: Of everything random.
        axes: Place in a study.
        checkpoint_every_n_steps: Optimizer steps between two in-stage checkpoints; 0 = none.
        evaluation: How states are scored.
        split: Which rows are scored after every stage.
        store: Folder where scores of the untrained backbone are shared between runs; `None` = not shared.
    """

    cell: str
    seed: int = 0
    axes: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_every_n_steps: int = 50
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    split: Split = "test"
    store: Path | None = None


def check_stream(data: StreamData) -> None:
    """Everything about the data that can be wrong, before a model is loaded.

    Raises:
        UserError: See the message.
    """
    for name, domain in data.columns.items():
        check_scorers(domain.scorers, where=f"data.domains.{name}")
    data.check()


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
            self._load(self.folders[len(self.records) - 1])
        for stage in self.stages[len(self.records) - 1 :]:
            self._stage(stage, info)
        record = build_record(module=self.module, data=self.data, info=info, stages=self.records)
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
        shared = self._shared_base()
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

    def _shared_base(self) -> RunFolder | None:
        if self.settings.store is None:
            return None
        parts = {
            "backbone": self.module.backbone.fingerprint(),
            "data": self.data.fingerprints(),
            "scorers": {name: domain.scorers for name, domain in self.data.columns.items()},
            "split": self.settings.split,
            "evaluation": asdict(self.settings.evaluation),
            "layout": self.module.layout,
        }
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return RunFolder(self.settings.store / "evaluations" / key[:32])

    # -- stages -------------------------------------------------------------------------------------------------

    def _stage(self, stage: Stage, info: RunInfo) -> None:
        """Train (unless that is done), save, score."""
        folder = self.folders[stage.index + 1]
        if (folder / "state.safetensors").is_file():
            facts = self._load(folder)
        else:
            facts = self._train(stage, folder, info)
        scores, seconds = self._evaluate(f"after {stage.domain}")
        facts |= {"evaluation_seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}
        self._complete(stage.index + 1, scores, facts)

    def _load(self, folder: Path) -> dict[str, Any]:
        """Bring module and mitigations to the state after a stage."""
        tree = self.folder.load_state(folder)
        self.module.adapter.load_state(self.module.model, tree["weights"])
        for name, mitigation in self.module.mitigations.items():
            mitigation.load_state_dict(tree["mitigations"][name])
        facts: dict[str, Any] = tree["facts"]
        return facts

    def _train(self, stage: Stage, folder: Path, info: RunInfo) -> dict[str, Any]:
        module, checkpoint = self.module, folder / "checkpoint.safetensors"
        module.begin_stage(stage, self.data.examples(stage, module.backbone.tokenizer))
        history = History(
            stage=stage,
            every_n_steps=self.trainers.log_every_n_steps,
            offset=sum(s.steps for s in self.stages[: stage.index]),
            write=self._write_line,
        )
        observers: list[Callback] = [history, *(c for view in self.views for c in view.callbacks(info, stage))]
        observers.append(StageCheckpoint(path=checkpoint, every_n_steps=self.settings.checkpoint_every_n_steps))
        self._fit(stage, folder, observers, checkpoint if checkpoint.is_file() else None)
        facts = {
            "stage": stage.index + 1,
            "domain": stage.domain,
            "train_seconds": history.totals["seconds"],
            "train_tokens": history.totals["tokens"],
            "steps": history.totals["steps"],
            "mitigation_state_bytes": {name: m.state_bytes() for name, m in module.mitigations.items()},
            "weights": module.weights_log,
        }
        states = {name: mitigation.state_dict() for name, mitigation in module.mitigations.items()}
        tree = {"weights": module.adapter.state(module.model), "mitigations": states, "facts": facts}
        self.folder.save_state(folder, tree)
        return facts

    def _fit(self, stage: Stage, folder: Path, observers: list[Callback], checkpoint: Path | None) -> None:
        module = self.module
        ranks = self.trainers.world_size
        micro = self.data.micro_batch(devices=ranks)
        accumulate = stage.batch_size // (micro * ranks)
        trainer = self.trainers.make(steps=stage.steps, accumulate=accumulate, folder=folder, observers=observers)
        done = 0 if checkpoint is None else int(load_tree(checkpoint)["global_step"]) * accumulate
        batches = StageBatches(stage=stage, micro_batch=micro, start=done, rank=trainer.global_rank, ranks=ranks)
        loader: DataLoader[Any] = DataLoader(
            module.dataset,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=partial(module.objective.collate, layout=module.layout),
            num_workers=self.data.num_workers,
        )
        module.model.train()
        with quiet_lightning():
            trainer.fit(module, train_dataloaders=loader, ckpt_path=checkpoint)
        if trainer.global_step != stage.steps:
            raise UserError(
                f"stage {stage.index + 1} ({stage.domain}) ran {trainer.global_step} of {stage.steps} steps",
                why="a callback or a limit of the Trainer ended it early",
                fix="remove trainer.max_time, trainer.limit_train_batches and early-stopping callbacks",
            )

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
