"""Observers of one stage: the in-stage checkpoint and the history of its steps. New for every stage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from residency.backbones.work import Work
from residency.core.errors import UserError
from residency.core.ranks import gather_facts, rank, tree_from_first
from residency.core.tensor_files import load_tree, save_tree
from residency.core.types import Batch, Stage, untyped
from residency.metrics.cost import optimizer_state_bytes

__all__ = ["History", "SafetensorsIO", "StageCheckpoint", "load_for_all"]


def load_for_all(path: Path) -> dict[str, Any]:
    """A checkpoint as rank 0 reads it, on every rank."""
    tree: dict[str, Any] = tree_from_first(load_tree(path) if rank() == 0 else None)
    return tree


class SafetensorsIO(CheckpointIO):
    """Lightning's checkpoints as one safetensors file each, written atomically; nothing is pickled."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the whole checkpoint."""
        save_tree(Path(path), checkpoint)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read it back, on the CPU."""
        return load_for_all(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete it."""
        Path(path).unlink(missing_ok=True)


class StageCheckpoint(Checkpoint):
    """Saves the running stage every n optimizer steps, each time over the last one.

    A `Checkpoint`, because Lightning runs those after all other callbacks: what a mitigation changes at the end of a
    batch is in the file.

    Never after the last step: a stage resumed there would have nothing left to run and its end hooks would not fire.

    Args:
        path: The checkpoint file.
        every_n_steps: Optimizer steps between two checkpoints; 0 = none.
    """

    def __init__(self, *, path: Path, every_n_steps: int) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self._saved_at = 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save where a step has just been completed."""
        step = trainer.global_step
        due = self.every_n_steps and step != self._saved_at and step % self.every_n_steps == 0
        if due and step < trainer.max_steps:
            self._saved_at = step
            trainer.save_checkpoint(self.path)


class History(Callback):
    """Sums a stage up: one line per logged step, and what the stage cost.

    Args:
        stage: The stage.
        every_n_steps: Optimizer steps between two lines.
        offset: Optimizer steps of the stream before this stage.
        write: Called with each line, on rank zero.

    Losses are means over all micro-batches of a step, those of other ranks included, and tokens are summed.
    """

    def __init__(
        self, *, stage: Stage, every_n_steps: int, offset: int, write: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self.stage = stage
        self.every_n_steps = every_n_steps
        self.offset = offset
        self.write = write
        self.optimizer_state_bytes = 0
        self.totals = {"seconds": 0.0, "tokens": 0, "steps": 0, "prepare_seconds": 0.0}
        self.totals |= {"passed_tokens": 0, "flops": 0}
        self._window: dict[str, float] = {}
        self._figures: dict[str, list[float]] = {}
        self._micro = 0
        # Of this rank, since they were last summed up.
        self._own = {"tokens": 0, "passed_tokens": 0, "flops": 0}
        self._last = (0.0, 0)
        self._clock = time.perf_counter()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """The clock of the steps runs from the first batch's loading to the last step's end."""
        now = time.perf_counter()
        work = untyped(module).backbone.work
        # What a resume needs to get here again is not what the stage costs.
        if not self.totals["prepare_seconds"]:
            self.totals["prepare_seconds"] = now - self._clock
            self._take(work)
        work.take()
        work.renew()
        self._clock = now
        self._last = (self.totals["seconds"], int(self.totals["tokens"]))

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Add up the micro-batches; write a line when a step is complete and due."""
        now = time.perf_counter()
        self.totals["seconds"] += now - self._clock
        self._clock = now
        self._own["tokens"] += batch.tokens
        self._take(module.backbone.work)
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == self.stage.steps
        complete = step != self.totals["steps"]
        if due or (step + 1) % self.every_n_steps == 0 or step + 1 == self.stage.steps:
            self._add(trainer.callback_metrics, ("loss", "adapter", *module.mitigations))
            self._add_figures(module.objective_log)
        if complete:
            self.totals["steps"] = step
            if due:
                means = self._means(step)
                self._sum_up()
                if trainer.is_global_zero:
                    self.write(self._line(trainer, step, means))
            self._window, self._figures, self._micro = {}, {}, 0

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """What the optimizer kept is gone with the Trainer."""
        self.optimizer_state_bytes = sum(optimizer_state_bytes(o) for o in trainer.optimizers)

    def close(self, module: Any) -> None:
        """What the adapter did with the last step's weights belongs to the training, too."""
        self.totals["seconds"] += time.perf_counter() - self._clock
        self._take(module.backbone.work)
        self._sum_up()

    def _take(self, work: Work) -> None:
        tokens, flops = work.take()
        self._own["passed_tokens"] += tokens
        self._own["flops"] += flops

    def _add(self, metrics: Mapping[str, torch.Tensor], groups: tuple[str, ...]) -> None:
        self._micro += 1
        for name, value in metrics.items():
            if name.partition("/")[0] in groups:
                self._window[name] = self._window.get(name, 0.0) + float(value)

    def _add_figures(self, figures: Mapping[str, torch.Tensor]) -> None:
        """What the objective says of a micro-batch; some have nothing to say, such as how wanted answers fare where
        there are none, and what cannot be known is no number.
        """
        for name, value in figures.items():
            if math.isfinite(number := float(value)):
                self._figures.setdefault(name, []).append(number)

    def _means(self, step: int) -> dict[str, float]:
        """Over the micro-batches of all ranks.

        Raises:
            UserError: One is no number; on every rank alike.
        """
        found = gather_facts([self._micro, self._window, self._figures])
        count = sum(micro for micro, _, _ in found)
        means: dict[str, float] = {}
        for _, window, _ in found:
            for name, value in window.items():
                means[name] = means.get(name, 0.0) + value / count
        for name, value in means.items():
            if not math.isfinite(value):
                raise _not_finite(name, value, self.stage, step)
        figures: dict[str, list[float]] = {}
        for *_, said in found:
            for name, values in said.items():
                figures.setdefault(name, []).extend(values)
        return means | {name: sum(values) / len(values) for name, values in figures.items()}

    def _sum_up(self) -> None:
        """Add what the ranks have read and computed to the totals, which are the same on all."""
        for own in gather_facts(self._own):
            for name, value in own.items():
                self.totals[name] += value
        self._own = dict.fromkeys(self._own, 0)

    def _line(self, trainer: Trainer, step: int, means: Mapping[str, float]) -> dict[str, Any]:
        seconds, tokens = self._last
        self._last = (self.totals["seconds"], int(self.totals["tokens"]))
        return {
            "stage": self.stage.index + 1,
            "domain": self.stage.domain,
            "step": step,
            "stream_step": self.offset + step,
            **means,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "tokens": self._last[1] - tokens,
            "seconds": round(self._last[0] - seconds, 4),
            # When it was trained: a view that shows the line later, or for another run that shares the stage, says so.
            "time": round(time.time(), 3),
        }

    def state_dict(self) -> dict[str, Any]:
        """Costs so far survive a kill. Lightning asks all ranks when it saves."""
        self._sum_up()
        return dict(self.totals)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the sums."""
        self.totals.update(state_dict)


def _not_finite(name: str, value: float, stage: Stage, step: int) -> UserError:
    return UserError(
        f"{name} is {value} at step {step} of stage {stage.index + 1} ({stage.domain})",
        why="training diverged; everything up to the last complete stage is kept",
        fix="lower the learning rate or a mitigation's strength, or set trainer.gradient_clip_val",
    )
