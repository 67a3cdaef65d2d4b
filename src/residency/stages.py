"""One stage: train on one domain, and bring back what an earlier call has trained."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from residency.checkpointing import History, StageCheckpoint
from residency.data import StreamData
from residency.domains.sampler import StageBatches
from residency.errors import UserError
from residency.module import ContinualModule
from residency.storage import load_tree
from residency.trainers import Trainers, quiet_lightning
from residency.types import Stage

__all__ = ["check_devices", "restore_stage", "train_stage"]


def check_devices(data: StreamData, trainers: Trainers) -> None:
    """What trains together, before a model is loaded.

    Raises:
        UserError: More than one process, or a batch size that cannot be divided.
    """
    if trainers.world_size > 1:
        raise UserError(
            f"trainer.devices and trainer.num_nodes give {trainers.world_size} processes",
            why="a stage is trained by one process; the record has one writer",
            fix="set trainer.devices to 1 and trainer.num_nodes to 1, and run several cells side by side instead",
        )
    data.micro_batch(devices=trainers.world_size)


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
    """Train, mix, let mitigations remember; goes on from an in-stage checkpoint where there is one.

    Args:
        module: In the state that the stage before left.
        data: Domains and batch size.
        trainers: Makes the Trainer.
        stage: Which one.
        folder: Of the stage.
        history: New; sums up what the stage cost.
        observers: New callbacks that only watch.
        checkpoint_every_n_steps: Optimizer steps between two in-stage checkpoints; 0 = none.

    Returns:
        What is stored: {"weights", "mitigations", "facts"}.
    """
    checkpoint = folder / "checkpoint.safetensors"
    module.to(trainers.root_device)
    module.begin_stage(stage, data.examples(stage, module.backbone.tokenizer))
    keeper = StageCheckpoint(path=checkpoint, every_n_steps=checkpoint_every_n_steps)
    resumed = checkpoint if checkpoint.is_file() else None
    _fit(module, data, trainers, stage, folder, [history, *observers, keeper], resumed)
    module.to(trainers.root_device)  # Lightning has brought it back to the CPU
    module.finish_stage()
    facts = {
        "stage": stage.index + 1,
        "domain": stage.domain,
        "train_seconds": history.totals["seconds"],
        "train_tokens": history.totals["tokens"],
        "steps": history.totals["steps"],
        "optimizer_state_bytes": history.optimizer_state_bytes,
        "mitigation_state_bytes": {name: m.state_bytes() for name, m in module.mitigations.items()},
        "weights": module.weights_log,
    }
    states = {name: mitigation.state_dict() for name, mitigation in module.mitigations.items()}
    return {"weights": module.adapter.state(module.model), "mitigations": states, "facts": facts}


def restore_stage(module: ContinualModule, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Bring module and mitigations to the state after a stage; its facts."""
    module.adapter.load_state(module.model, tree["weights"])
    for name, mitigation in module.mitigations.items():
        mitigation.load_state_dict(tree["mitigations"][name])
    return dict(tree["facts"])


def _fit(
    module: ContinualModule,
    data: StreamData,
    trainers: Trainers,
    stage: Stage,
    folder: Path,
    callbacks: list[Callback],
    checkpoint: Path | None,
) -> None:
    ranks = trainers.world_size
    micro = data.micro_batch(devices=ranks)
    accumulate = stage.batch_size // (micro * ranks)
    trainer = trainers.make(steps=stage.steps, accumulate=accumulate, folder=folder, observers=callbacks)
    done = 0 if checkpoint is None else int(load_tree(checkpoint)["global_step"]) * accumulate
    loader: DataLoader[Any] = DataLoader(
        module.dataset,  # type: ignore[arg-type]
        batch_sampler=StageBatches(stage=stage, micro_batch=micro, start=done, rank=trainer.global_rank, ranks=ranks),
        collate_fn=partial(module.objective.collate, layout=module.layout),
        num_workers=data.num_workers,
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
