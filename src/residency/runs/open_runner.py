"""A stage runner of parts that have been checked against each other, with the stages that it is to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from residency.core.types import Stage
from residency.domains.stream_data import StreamData
from residency.engine.compatibility import check_objectives, check_parts, check_rows, check_validation
from residency.engine.dummy_step import check_optimization
from residency.engine.module import ContinualModule
from residency.engine.sharding import check_shardable
from residency.engine.stage import check_devices
from residency.engine.stage_overrides import (
    StageOverrides,
    StageSettings,
    check_overrides,
    of_stage,
    told_of,
)
from residency.engine.trainers import Trainers
from residency.runs.augmentation import use_base
from residency.runs.rank_steps import RankSteps
from residency.runs.settings import StreamSettings, check_lengths, check_stream
from residency.runs.stage_runner import StageRunner
from residency.runs.views.base import View

__all__ = ["open_runner", "plan_stages"]


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
    module: ContinualModule,
    data: StreamData,
    trainers: Trainers,
    settings: StreamSettings,
    views: Sequence[View] = (),
    *,
    steps: RankSteps | None = None,
    planned: bool = False,
) -> StageRunner:
    """Everything that can be wrong is found here, before a model is loaded and a row is scored.

    Args:
        module: Not built.
        data: Domains and probes.
        trainers: Devices and steps.
        settings: Of the run.
        views: What shows it.
        steps: What other processes carry out.
        planned: Whether nothing will be trained here, so that no other processes are needed.

    Raises:
        UserError: What is wrong, and of which stage where it has settings of its own.
    """
    use_base(module, data, trainers)
    own = settings.stages
    check_overrides(own, domains=data.domains, stage_tokens=settings.stage_tokens)
    check_stream(data, batch_sizes=[one.batch_size for one in own.values() if one.batch_size])
    module.backbone = module.backbone.for_stream(data)
    check_devices(data, trainers, module.adapter, overrides=own, planned=planned)
    check_validation(module.mitigations, data)
    module.stage_settings = StageSettings(run=StageOverrides(objective=module.objective), own=own)
    objectives = {name: module.stage_settings.objective(name) or module.objective for name in data.order}
    for name, objective in objectives.items():
        with told_of(name, of_stage(own, name)):
            check_parts(module.backbone, module.adapter, module.mitigations, objective)
            if trainers.shards:
                check_shardable(module.backbone, module.adapter, module.mitigations, objective)
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
    return StageRunner(
        module=module, data=data, trainers=trainers, settings=settings, stages=stages, views=views, ranks=steps
    )
