"""One run: the stages of a stream in order, one fresh Trainer each; finish, evaluate, record, resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from residency.core.markers import check_place
from residency.core.ranks import rank
from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.engine.sharding import check_observers
from residency.engine.trainers import Trainers
from residency.inspection.inspection import Inspection
from residency.runs.augmentation import use_base
from residency.runs.folder import RunFolder
from residency.runs.inputs import check_complete, inputs_of, keep_inputs
from residency.runs.keys import RunKeys
from residency.runs.open_runner import open_runner
from residency.runs.rank_steps import RankSteps
from residency.runs.run_stages import RunStages
from residency.runs.settings import StreamSettings, check_stream
from residency.runs.shown_views import show_again
from residency.runs.stage_cache import StageCache
from residency.runs.stage_runner import StageRunner
from residency.runs.store.store import STORE, Store
from residency.runs.views.base import View
from residency.runs.views.guarded import GuardedView

__all__ = ["StreamSettings", "check_stream", "open_stage_cache", "train_stream"]


def train_stream(
    *,
    module: ContinualModule,
    data: StreamData,
    trainers: Trainers,
    folder: RunFolder,
    settings: StreamSettings,
    config: Mapping[str, Any] | None = None,
    views: Sequence[View] = (),
    inspection: Inspection | None = None,
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
        inspection: What looks inside the model.

    Returns:
        The record, as in results.json. A complete run is returned without loading anything. On other ranks than the
        first, which only take part: nothing.

    Raises:
        UserError: What the user can mend; nothing half written stays.
    """
    use_base(module, data, trainers)
    steps = RankSteps()
    make = partial(open_runner, module, data, trainers, settings, steps=steps)
    if rank() > 0:
        steps.follow(make)
        return {}
    guarded = [GuardedView(view) for view in views]
    with steps.leading():
        return _make_run(partial(make, guarded), module, data, folder, settings, config, guarded, inspection)


def _make_run(
    make: Callable[[], StageRunner],
    module: ContinualModule,
    data: StreamData,
    folder: RunFolder,
    settings: StreamSettings,
    config: Mapping[str, Any] | None,
    views: Sequence[View],
    inspection: Inspection | None,
) -> dict[str, Any]:
    if (done := folder.complete_record(config)) is not None:
        if config is not None:
            check_complete(folder, module, data)
        show_again(folder, views, done)
        return done
    if settings.store is not None:
        check_place(settings.store, STORE)
    with folder.locked():
        if config is not None:
            folder.keep_config(config)
        if (done := folder.complete_record(config)) is not None:
            # Somebody else has finished it in the meantime.
            return done
        runner = make()
        if config is not None:
            keep_inputs(folder, inputs_of(module, data))
        runner.inspection = (inspection or Inspection()).checked(module.backbone)
        if runner.trainers.shards:
            check_observers(runner.inspection.observers)
        stage_cache = _stage_cache(runner, config) if settings.store is not None and config is not None else None
        run = RunStages(runner, folder, stage_cache, config)
        try:
            return run.execute()
        except BaseException as error:
            for view in views:
                view.fail(error)
            raise


def open_stage_cache(
    *,
    module: ContinualModule,
    data: StreamData,
    trainers: Trainers,
    settings: StreamSettings,
    config: Mapping[str, Any],
    views: Sequence[View] = (),
    inspection: Inspection | None = None,
) -> StageCache:
    """The stages of a run in a store, without a run folder: for a study's workers and its planner.

    Args:
        module: Not yet built.
        data: Domains, probes, order, batch size.
        trainers: Makes the Trainer of each stage.
        settings: Names the store.
        config: The resolved config.
        views: What shows the work.
        inspection: What looks inside the model while a stage is trained.

    Raises:
        UserError: The data or the devices are wrong.
    """
    runner = open_runner(module, data, trainers, settings, views)
    runner.inspection = (inspection or Inspection()).checked(module.backbone)
    return _stage_cache(runner, config)


def _stage_cache(runner: StageRunner, config: Mapping[str, Any]) -> StageCache:
    keys = RunKeys(
        module=runner.module,
        data=runner.data,
        stages=runner.stages,
        config=config,
        observers=runner.inspection.observers,
    )
    assert runner.settings.store is not None
    return StageCache(runner=runner, keys=keys, store=Store(runner.settings.store))
