"""The runner on which the stages of one run are made: it knows in which state the module is, and how to bring it on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from residency.core.environment import count_parameters
from residency.core.types import Stage
from residency.domains.stream_data import StreamData
from residency.engine.checkpointing import History
from residency.engine.compatibility import check_objectives, check_parts, check_rows, check_validation
from residency.engine.divergence import check_scores
from residency.engine.dummy_step import check_optimization
from residency.engine.module import ContinualModule
from residency.engine.scoring.evaluation import Evaluation, evaluate
from residency.engine.stage import check_devices, finish_stage, restore_stage, take_trained_stage, train_stage
from residency.engine.stage_overrides import (
    StageOverrides,
    StageSettings,
    check_overrides,
    describe_stages,
    of_stage,
    told_of,
)
from residency.engine.trainers import Trainers
from residency.inspection.inspection import Inspection
from residency.runs.settings import StreamSettings, check_lengths, check_stream
from residency.runs.views.base import RunInfo, View

__all__ = ["StageRunner", "open_runner", "plan_stages"]

Line = Mapping[str, Any]


def plan_stages(data: StreamData, trainers: Trainers, settings: StreamSettings, tokenizer: Any = None) -> list[Stage]:
    """Place, steps and batch size of every stage.

    Args:
        data: Domains and order.
        trainers: Give the number of steps.
        settings: Seed; what single stages do otherwise; tokens of a stage where the budget is counted in tokens.
        tokenizer: Needed for a budget in tokens.
    """
    found = []
    for index, name in enumerate(data.order):
        rows, own = data.domains[name].rows("train"), of_stage(settings.stages, name)
        size = own.batch_size or data.batch_size
        if settings.stage_tokens is None:
            steps = trainers.steps(rows=len(rows), batch_size=size, own=(own.steps, own.epochs))
        else:
            encode = data.domains[name].template.encode
            tokens = sum(len(encode(tokenizer, domain=name, row=row)) for row in rows)
            steps = max(1, round(settings.stage_tokens * len(rows) / (tokens * size)))
        shape = {"steps": steps, "batch_size": size, "stages": len(data.order)}
        found.append(Stage(index=index, domain=name, seed=settings.seed, kind=data.domains[name].kind, **shape))
    return found


def open_runner(
    module: ContinualModule, data: StreamData, trainers: Trainers, settings: StreamSettings, views: Sequence[View]
) -> StageRunner:
    """Everything that can be wrong is found here, before a model is loaded and a row is scored.

    Raises:
        UserError: What is wrong, and of which stage where it has settings of its own.
    """
    own = settings.stages
    check_overrides(own, domains=data.domains, stage_tokens=settings.stage_tokens)
    check_stream(data, batch_sizes=[one.batch_size for one in own.values() if one.batch_size])
    check_devices(data, trainers, module.adapter, overrides=own)
    check_validation(module.mitigations, data)
    module.stage_settings = StageSettings(run=StageOverrides(objective=module.objective), own=own)
    objectives = {name: module.stage_settings.objective(name) or module.objective for name in data.order}
    for name, objective in objectives.items():
        with told_of(name, of_stage(own, name)):
            check_parts(module.backbone, module.adapter, module.mitigations, objective)
    check_objectives(objectives, module.mitigations)
    for name, objective in objectives.items():
        check_rows(objective, data.domains[name], name)
    tokenizer = None if settings.stage_tokens is None else module.backbone.tokenizer
    stages = plan_stages(data, trainers, settings, tokenizer)
    check_lengths(module.backbone, data)
    run = module.optimizer_factory, module.scheduler_factory
    different = {(replace(of_stage(own, s.domain), objective=None), s.steps): s for s in stages}
    for stage in different.values():
        with told_of(stage.domain, of_stage(own, stage.domain)):
            check_optimization(*module.stage_settings.factories(stage.domain, *run), steps=[stage.steps])
    return StageRunner(module=module, data=data, trainers=trainers, settings=settings, stages=stages, views=views)


class StageRunner:
    """A module and where it stands.

    Args:
        module: Not yet built; that happens when something has to be computed.
        data: Domains and probes.
        trainers: Makes the Trainer of each stage.
        settings: Seed, evaluation, checkpoints.
        stages: What is to be trained.
        views: What shows it.
    """

    def __init__(
        self,
        *,
        module: ContinualModule,
        data: StreamData,
        trainers: Trainers,
        settings: StreamSettings,
        stages: Sequence[Stage],
        views: Sequence[View],
    ) -> None:
        self.module = module
        self.data = data
        self.trainers = trainers
        self.settings = settings
        self.stages = stages
        self.views = views
        self.inspection = Inspection()
        """What looks inside the model; nobody by default."""
        self.at = 0
        """Whose state the module has: 0 = before training, k = after the k-th stage is finished; -1 = in between."""
        self.trained = 0
        """The stage that the module has trained, or taken over, and not finished; 0 = none."""
        self.trained_here = 0
        """The last stage that was trained by this runner."""
        self._untouched = {name: dict(m.state_dict()) for name, m in module.mitigations.items()}

    def build(self) -> None:
        """Load the model, once."""
        self.module.build(seed=self.settings.seed)

    def model_facts(self) -> dict[str, Any]:
        """Size and layout of the built model."""
        self.build()
        trainable, total = count_parameters(self.module.model)
        layout = {"layout": self.module.layout, "layout_reason": self.module.layout_reason}
        return {"trainable": trainable, "total": total, **layout}

    def info(self, facts: Mapping[str, Any], *, resumed: int) -> RunInfo:
        """What views want to know."""
        return RunInfo(
            cell=self.settings.cell,
            seed=self.settings.seed,
            axes=self.settings.axes,
            domains=self.data.order,
            probes=list(self.data.probes),
            layout=f"{facts['layout']}: {facts['layout_reason']}",
            trainable=facts["trainable"],
            total=facts["total"],
            resumed=resumed,
            split=self.settings.split,
            data=self.data.count_tokens(self.module.backbone.tokenizer, self.settings.split),
            stages=describe_stages(self.stages, self.settings.stages),
        )

    # -- states -------------------------------------------------------------------------------------------------

    def restore(self, k: int, load: Callable[[int], Mapping[str, Any]]) -> None:
        """Bring the module to the state after stage k.

        Args:
            k: 0 = before training.
            load: Gives the stored state after a stage.
        """
        self.module.weights_after = lambda stage: load(stage)["weights"]
        if self.at == k and hasattr(self.module, "model"):
            return
        if k:
            tree = load(k)
            if self.at == k:
                # Loading made it: the module is there already.
                return
            self.build()
            restore_stage(self.module, tree)
        else:
            self._start_over()
        self.at, self.trained = k, 0

    def _start_over(self) -> None:
        if self.at != 0:
            del self.module.model
            for name, state in self._untouched.items():
                self.module.mitigations[name].load_state_dict(dict(state))
        self.build()

    def train(self, k: int, *, work: Path, write: Callable[[Line], None], info: RunInfo) -> dict[str, Any]:
        """Train the k-th stage from the state after the one before; its facts.

        Args:
            k: From 1.
            work: Where its checkpoint lies.
            write: Called with every line of the history.
            info: For the views.
        """
        stage = self.stages[k - 1]
        self.at = -1

        def tell(line: Line) -> None:
            write(line)
            for view in self.views:
                view.step(line)

        facts = train_stage(
            module=self.module,
            data=self.data,
            trainers=self.trainers,
            stage=stage,
            folder=work,
            history=History(
                stage=stage,
                every_n_steps=self.trainers.log_every_n_steps,
                offset=self.offset(k),
                write=tell,
            ),
            observers=[
                *(callback for view in self.views for callback in view.callbacks(info, stage)),
                *self.inspection.callbacks(stage),
            ],
            checkpoint_every_n_steps=self.settings.checkpoint_every_n_steps,
        )
        self.trained = self.trained_here = k
        return facts | self.inspection.during()

    def offset(self, k: int) -> int:
        """Optimizer steps of the stream before the k-th stage."""
        return sum(stage.steps for stage in self.stages[: k - 1])

    def take_trained(self, k: int, tree: Mapping[str, Any]) -> None:
        """Take over what another run has trained as its k-th stage."""
        self.at = -1
        take_trained_stage(self.module, self.data, self.stages[k - 1], tree, device=self.trainers.root_device)
        self.trained = k

    def finish(self, k: int, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What follows the training of the k-th stage; what is to be stored."""
        last = k == len(self.stages)
        tree = finish_stage(self.module, facts, device=self.trainers.root_device, remember=not last)
        self.at, self.trained = k, 0
        return tree

    # -- scores -------------------------------------------------------------------------------------------------

    def evaluate(self, columns: Sequence[str] | None = None) -> tuple[Evaluation, dict[str, Any]]:
        """Score the state in which the module is; (scores, what they cost)."""
        start = time.perf_counter()
        work = self.module.backbone.work
        work.take()
        work.renew()
        chosen = {name: self.data.columns[name] for name in columns or self.data.columns}
        total = sum(len(domain.rows(self.settings.split)) for domain in chosen.values())
        title = f"after {self.stages[self.at - 1].domain}" if self.at else "before training"
        self.module.to(self.trainers.root_device)
        with ExitStack() as stack:
            if self.at == 0 and "reference" in self.module.adapter.provides:
                stack.enter_context(self.module.adapter.reference(self.module.model))
            advances = [stack.enter_context(view.evaluating(title, total)) for view in self.views]

            def advance(column: str, rows: int) -> None:
                for one in advances:
                    one(column, rows)

            scores = evaluate(
                self.module,
                self.data,
                split=self.settings.split,
                settings=self.settings.evaluation,
                columns=list(chosen),
                learned=self.at,
                advance=advance,
            )
        check_scores(scores, after=title, steps=self.offset(self.at + 1))
        tokens, flops = work.take()
        seconds = time.perf_counter() - start
        return scores, {"evaluation_seconds": seconds, "evaluation_tokens": tokens, "evaluation_flops": flops}
