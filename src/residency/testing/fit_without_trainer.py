"""The fit of one stage without a Trainer: the real module, its real hooks, and Lightning's own step, in a few lines.

A Trainer costs more than the few steps of a tiny stage. `Fits` makes what stands in for it where `engine.stage`
asks for one. Strategy, precision plugin and wrapped optimizer are Lightning's, so backward, clipping and the optimizer
step are too; the order of the hooks around them is written out here, and `test_fitting.py` holds it, call by call and
bit by bit, against a real Trainer. Left out are loggers, progress, validation loops and other ranks: whoever asks for
them gets an AttributeError.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy

from residency.core.tensor_files import load_tree, save_tree
from residency.core.types import Batch, untyped
from residency.engine.module import ContinualModule
from residency.engine.trainers import Trainers

__all__ = ["Fit", "Fits"]


class Fits(Trainers):
    """Makes a `Fit` where `Trainers` makes a Trainer.

    Args:
        options: As those of a Trainer; only `gradient_clip_val` and `callbacks` are looked at.
    """

    def make(self, *, steps: int, accumulate: int = 1, folder: Path, observers: list[Callback]) -> Any:
        """For one stage."""
        callbacks = [*self._options().get("callbacks", ()), *observers]
        return Fit(steps=steps, clip=self.gradient_clip_val, callbacks=callbacks, accumulate=accumulate)


class Fit:
    """What hooks see of a Trainer while one stage is fitted.

    Args:
        steps: `max_steps`.
        clip: `gradient_clip_val`.
        callbacks: Beside those of the module.
        accumulate: Micro-batches per step.
    """

    current_epoch = 0
    global_rank = 0
    local_rank = 0
    world_size = 1
    is_global_zero = True
    log_every_n_steps = 1
    gradient_clip_algorithm = None

    def __init__(self, *, steps: int, clip: float | None, callbacks: list[Callback], accumulate: int = 1) -> None:
        self.accumulate_grad_batches = accumulate
        self.max_steps = steps
        self.gradient_clip_val = clip
        self.callbacks = callbacks
        self.global_step = 0
        self.should_stop = False
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.profiler = PassThroughProfiler()
        device = torch.device("cpu")
        self.strategy = SingleDeviceStrategy(device, accelerator=CPUAccelerator(), precision_plugin=Precision())
        self.lightning_module: ContinualModule

    @property
    def optimizers(self) -> list[Any]:
        """Of this stage."""
        return self.strategy.optimizers

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """Of this stage."""
        return self.strategy.lr_scheduler_configs

    @property
    def precision_plugin(self) -> Precision:
        """Clips."""
        return self.strategy.precision_plugin

    def log_dict(self, values: Mapping[str, Any], **options: Any) -> None:
        """Stands in for the module's."""
        self.callback_metrics |= {name: torch.as_tensor(value) for name, value in values.items()}

    def fit(self, module: ContinualModule, *, train_dataloaders: Iterable[Batch], ckpt_path: Path | None) -> None:
        """From the first step to the last, or from the one after the checkpoint."""
        self._connect(module)
        checkpoint = load_tree(ckpt_path) if ckpt_path is not None else {}
        self._call("setup", stage="fit")
        if checkpoint:
            self._restore(checkpoint)
        self.strategy.setup_optimizers(self)  # type: ignore[arg-type]
        self._call("on_fit_start")
        if checkpoint:
            self.strategy.load_optimizer_state_dict(checkpoint)
            self.global_step = int(checkpoint["global_step"])
        module.zero_grad()
        self._call("on_train_start")
        if not self.should_stop:
            self._epoch(train_dataloaders, resumed=bool(checkpoint))
        self._call("on_train_end")
        self._call("on_fit_end")
        self._call("teardown", stage="fit")

    def _connect(self, module: ContinualModule) -> None:
        self.lightning_module = module
        self.strategy.connect(module)
        last = [callback for callback in self.callbacks if isinstance(callback, Checkpoint)]
        first = [callback for callback in self.callbacks if callback not in last]
        self.callbacks = [*first, *module.configure_callbacks(), *last]
        module.trainer = self  # type: ignore[assignment]
        untyped(module).log_dict = self.log_dict

    def _epoch(self, batches: Iterable[Batch], *, resumed: bool) -> None:
        if not resumed:
            self._call("on_train_epoch_start")
        for index, batch in enumerate(batches, self.global_step * self.accumulate_grad_batches):
            self._step(batch, index)
            if self.should_stop:
                break
        self._call("on_train_epoch_end")

    def _step(self, batch: Batch, index: int) -> None:
        module, (optimizer,) = self.lightning_module, self.optimizers
        accumulate = self.accumulate_grad_batches
        self._call("on_train_batch_start", batch, index)
        output = {}

        @torch.enable_grad()
        def closure() -> torch.Tensor:
            loss: torch.Tensor = untyped(self.strategy).training_step(batch, index)
            output["loss"] = loss.detach()
            if index % accumulate == 0:
                self._call("on_before_zero_grad", optimizer)
                module.optimizer_zero_grad(0, index, optimizer)
            self.strategy.backward(loss / accumulate, optimizer)
            return output["loss"]

        if (index + 1) % accumulate:
            closure()
            self._call("on_train_batch_end", output, batch, index)
            return
        module.optimizer_step(0, index, self.strategy._lightning_optimizers[0], closure)
        self.global_step += 1
        for config in self.lr_scheduler_configs:
            module.lr_scheduler_step(config.scheduler, None)
        self._call("on_train_batch_end", output, batch, index)

    def save_checkpoint(self, path: Path) -> None:
        """What a Trainer stores of a stage that runs on."""
        checkpoint: dict[str, Any] = {"global_step": self.global_step}
        states = {callback.state_key: callback.state_dict() for callback in self.callbacks}
        checkpoint["callbacks"] = {key: state for key, state in states.items() if state}
        checkpoint["optimizer_states"] = [self.strategy.optimizer_state(optimizer) for optimizer in self.optimizers]
        checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in self.lr_scheduler_configs]
        self._call("on_save_checkpoint", checkpoint)
        save_tree(path, checkpoint)

    def _restore(self, checkpoint: Mapping[str, Any]) -> None:
        module = self.lightning_module
        module.on_load_checkpoint(checkpoint)
        for callback in self.callbacks:
            callback.on_load_checkpoint(self, module, checkpoint)  # type: ignore[arg-type]
        for callback in self.callbacks:
            if state := checkpoint["callbacks"].get(callback.state_key):
                callback.load_state_dict(copy.deepcopy(state))

    def _call(self, hook: str, *args: Any, **named: Any) -> None:
        """A hook of the callbacks, then the module's."""
        module = self.lightning_module
        for callback in self.callbacks:
            getattr(callback, hook)(self, module, *args, **named)
        getattr(module, hook)(*args, **named)
