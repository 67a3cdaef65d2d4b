"""One stage: train on one domain, what follows training, and bringing back what was stored of either."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from residency.adapters.base import Adapter
from residency.core.environment import peak_memory_bytes
from residency.core.errors import UserError
from residency.core.ranks import from_first, gather_facts, rank, ranks
from residency.core.types import NOTHING, Batch, Example, GlobalBatch, Layout, Stage
from residency.domains.sampler import StageBatches, StepParts, count_learned
from residency.domains.stream_data import StreamData
from residency.engine.checkpointing import History, StageCheckpoint, load_for_all
from residency.engine.compatibility import check_steps
from residency.engine.divergence import check_finite
from residency.engine.module import ContinualModule
from residency.engine.stage_overrides import StageOverrides, of_stage, told_of
from residency.engine.trainers import Trainers, quiet_lightning

__all__ = ["begin_stage", "check_devices", "finish_stage", "restore_stage", "take_trained_stage", "train_stage"]


def check_devices(
    data: StreamData,
    trainers: Trainers,
    adapter: Adapter,
    *,
    overrides: Mapping[str, StageOverrides] | None = None,
    planned: bool = False,
) -> None:
    """What trains together, before a model is loaded.

    Args:
        data: Batch size.
        trainers: Devices, clipping.
        adapter: The adapter.
        overrides: Settings of single stages, by domain.
        planned: Whether nothing will be trained here: the processes need not be there.

    Raises:
        UserError: Processes that were not started, a batch size that cannot be divided, or an adapter that cannot
            accumulate, clip or wait for other processes and should.
    """
    wanted = trainers.world_size
    if wanted != ranks() and not planned:
        raise UserError(
            f"trainer.devices and trainer.num_nodes give {wanted} processes, and there are {ranks()}",
            why="the others are started by running the command again, which is not what a program that calls residency "
            "or a worker of a sweep was started with",
            fix="start it with `residency fit --config ...` or by torchrun, or set trainer.devices and num_nodes to 1",
        )
    for domain in data.order:
        own = of_stage(overrides or {}, domain)
        batch = own.batch_size or data.batch_size
        with told_of(domain, own):
            micro = data.micro_batch(devices=wanted, batch=batch)
            check_steps(adapter, clip=trainers.gradient_clip_val, accumulate=batch // (micro * wanted), ranks=wanted)


def train_stage(
    *,
    module: ContinualModule,
    data: StreamData,
    trainers: Trainers,
    stage: Stage,
    folder: Path,
    history: History,
    observers: list[Callback],
    checkpoint_every_n_steps: int,
) -> dict[str, Any]:
    """Train; goes on from an in-stage checkpoint where there is one. What follows training is left to `finish_stage`.

    Args:
        module: In the state that the stage before left.
        data: Domains and batch size.
        trainers: Makes the Trainer.
        stage: Which one.
        folder: Where its checkpoint lies.
        history: New; sums up what the stage cost.
        observers: New callbacks that only watch.
        checkpoint_every_n_steps: Optimizer steps between two in-stage checkpoints; 0 = none.

    Returns:
        The facts: what the training cost. `prepare_seconds` are those before the first step (rewriting targets,
        generating a rehearsal, asking a teacher), `train_seconds` those of the steps. `train_tokens` and `train_flops`
        are of every pass up to here, `batch_tokens` those of the batches alone. `rows_learned` are the domain's
        distinct rows that some batch had.
    """
    checkpoint = folder / "checkpoint.safetensors"
    module.to(trainers.root_device)
    resumed = checkpoint if from_first(checkpoint.is_file()) else None
    steps, stored = _done(module, resumed) if resumed else (0, {})
    module.backbone.work.take()
    module.backbone.work.renew()
    begin_stage(module, data, stage, stored=stored)
    keeper = StageCheckpoint(path=checkpoint, every_n_steps=checkpoint_every_n_steps)
    _fit(module, data, trainers, stage, folder, [history, *observers, keeper], resumed, steps=steps)
    history.close(module)
    check_finite(module.adapter, module.model, stage)
    spent = gather_facts([history.totals["prepare_seconds"], history.totals["seconds"], peak_memory_bytes()])
    prepare_seconds, train_seconds, memory = (max(column) for column in zip(*spent, strict=True))
    return {
        "stage": stage.index + 1,
        "domain": stage.domain,
        "prepare_seconds": prepare_seconds,
        "train_seconds": train_seconds,
        "train_tokens": history.totals["passed_tokens"],
        "batch_tokens": history.totals["tokens"],
        "train_flops": history.totals["flops"],
        "steps": history.totals["steps"],
        "rows_learned": count_learned(
            module.dataset, stage.domain, positions=int(history.totals["steps"]) * stage.batch_size
        ),
        "optimizer_state_bytes": history.optimizer_state_bytes,
        "peak_memory_bytes": memory,
        "ranks": ranks(),
    }


def take_trained_stage(
    module: ContinualModule, data: StreamData, stage: Stage, tree: Mapping[str, Any], *, device: torch.device
) -> None:
    """Bring a module to where `train_stage` would have brought it, by what that left behind in another run.

    Args:
        module: In the state that the stage before left.
        data: Domains and batch size.
        stage: Which one.
        tree: {"weights", "mitigations": the states of those that took part in the training}.
        device: Where to compute.
    """
    module.to(device)
    begin_stage(module, data, stage, stored=tree["mitigations"])
    # Whoever did not take part in the training has yet to see the weights from which it started.
    absent = [m for name, m in module.mitigations.items() if name not in tree["mitigations"]]
    for mitigation in absent:
        mitigation.on_domain_start(module, stage)
    module.adapter.load_state(module.model, tree["weights"])


def finish_stage(
    module: ContinualModule, facts: Mapping[str, Any], *, device: torch.device, remember: bool = True
) -> dict[str, Any]:
    """What follows training: mix weights, let mitigations remember.

    Args:
        module: As the last step left it.
        facts: Of the training.
        device: Where to compute.
        remember: Whether another stage follows, for which mitigations remember this one.

    Returns:
        What is stored: {"weights", "mitigations", "facts"}, and "served" where other weights are scored than training
        goes on from.
    """
    start = time.perf_counter()
    work = module.backbone.work
    work.take()
    work.renew()
    module.to(device)  # Lightning has brought it back to the CPU
    index, every = module.stage.index, module.mitigations.items()
    # Without remembering, those count that had a part in the weights: runs without the others share them.
    taking_part = {n: m for n, m in every if remember or m.touches_training(index) or m.changes_weights(index)}
    held = {name: m.state_bytes() for name, m in taking_part.items()}
    module.finish_stage(remember=remember)
    tokens, flops = (sum(spent) for spent in zip(*gather_facts(work.take()), strict=True))
    more = {
        "finish_tokens": tokens,
        "finish_flops": flops,
        "finish_seconds": time.perf_counter() - start,
        # Some drop at the end what they held during the stage, others take it in only then.
        "mitigation_state_bytes": {n: max(held[n], m.state_bytes()) for n, m in taking_part.items()},
        "weights": module.weights_log,
        "kept_rows": {n: dict(m.kept_rows()) for n, m in taking_part.items() if m.keeps_examples and remember},
    }
    served = {"served": dict(module.served)} if module.served else {}
    return {**training_state(module, taking_part), **served, "facts": {**facts, **more}}


def training_state(module: ContinualModule, watched: Iterable[str]) -> dict[str, Any]:
    """Weights, and the states of the mitigations that are named."""
    states = {name: module.mitigations[name].state_dict() for name in watched}
    return {"weights": module.adapter.state(module.model), "mitigations": states}


def restore_stage(module: ContinualModule, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Bring module and mitigations to the state after a stage; its facts."""
    module.adapter.load_state(module.model, tree["weights"])
    module.served = dict(tree.get("served", {}))
    for name, state in tree["mitigations"].items():
        # The last stage may come from a run with other mitigations; no training will ask for their states.
        if name in module.mitigations:
            module.mitigations[name].load_state_dict(state)
    return dict(tree["facts"])


def begin_stage(
    module: ContinualModule, data: StreamData, stage: Stage, *, stored: Mapping[str, Any] = NOTHING
) -> None:
    """Give a module the rows of its next stage.

    Args:
        module: In the state that the stage before left.
        data: Domains and batch size.
        stage: Which one.
        stored: States of the mitigations that prepared this stage before, by name.
    """
    tokenizer = module.backbone.tokenizer
    # Without other labels as alternatives: what is validated is the likelihood of the completion.
    validation: Callable[[], Sequence[Example]] = cache(
        partial(data.evaluation_examples, stage.domain, "validation", tokenizer, competing=0)
    )
    module.begin_stage(stage, data.examples(stage, tokenizer), validation, stored=stored)


def _done(module: ContinualModule, checkpoint: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """The steps behind an in-stage checkpoint, and what it holds of each mitigation, by name."""
    tree = load_for_all(checkpoint)
    states = {name: tree["callbacks"].get(m.state_key, {}) for name, m in module.mitigations.items()}
    return int(tree["global_step"]), states


def _lay_out(collate: Callable[..., Batch], layout: Layout, part: GlobalBatch) -> Batch:
    """A micro-batch that knows the global batch of its step."""
    return replace(collate([part.examples[slot] for slot in part.slots], layout=layout), part_of=part)


def _fit(
    module: ContinualModule,
    data: StreamData,
    trainers: Trainers,
    stage: Stage,
    folder: Path,
    callbacks: list[Callback],
    checkpoint: Path | None,
    *,
    steps: int,
) -> None:
    micro = data.micro_batch(devices=ranks(), batch=stage.batch_size)
    accumulate = stage.batch_size // (micro * ranks())
    trainer = trainers.make(steps=stage.steps, accumulate=accumulate, folder=folder, observers=callbacks)
    done = steps * accumulate
    loader: DataLoader[Any] = DataLoader(
        StepParts(dataset=module.dataset, stage=stage, parts=accumulate * ranks()),  # type: ignore[arg-type]
        batch_sampler=StageBatches(stage=stage, micro_batch=micro, start=done, rank=rank(), ranks=ranks()),
        collate_fn=partial(_lay_out, module.objective.collate, module.layout),
        num_workers=data.num_workers,
        pin_memory=trainers.root_device.type == "cuda",
    )
    module.model.train()
    with quiet_lightning():
        trainer.fit(module, train_dataloaders=loader, ckpt_path=checkpoint)
    if trainer.global_step != stage.steps and not module.ended_early:
        raise UserError(
            f"stage {stage.index + 1} ({stage.domain}) ran {trainer.global_step} of {stage.steps} steps",
            why="a callback or a limit of the Trainer ended it early",
            fix="remove trainer.max_time, trainer.limit_train_batches and early-stopping callbacks (to stop early, use "
            "configs/mitigation/early_stopping.yaml)",
        )
