"""The fit of one stage without a Trainer: the real module, its real hooks, and Lightning's own step, in a few lines.

A Trainer costs more than the five steps of a tiny stage. `Fit` stands in for it: strategy, precision plugin and wrapped
optimizer are Lightning's, so backward, clipping and the optimizer step are too; the order of the hooks around them is
written out here, and `test_fitting.py` holds it, call by call and bit by bit, against a real Trainer. Left out are data
loaders, loggers, progress, files and other ranks: whoever asks for them gets an AttributeError.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy

from residency import storage
from residency.domains.sampler import StageBatches
from residency.module import ContinualModule
from residency.types import Batch

__all__ = ["Fit", "stored"]


class Fit:
    """What hooks see of a Trainer while one stage is fitted.

    Args:
        module: Built, and `begin_stage` called.
        clip: `gradient_clip_val`.
        save_at: Optimizer step after which the in-stage checkpoint is kept in `checkpoint`; 0 = never.
    """

    current_epoch = 0
    global_rank = 0
    local_rank = 0
    world_size = 1
    is_global_zero = True
    should_stop = False
    accumulate_grad_batches = 1
    log_every_n_steps = 1
    gradient_clip_algorithm = None

    def __init__(self, module: ContinualModule, *, clip: float | None = 1.0, save_at: int = 0) -> None:
        self.lightning_module = module
        self.callbacks = module.configure_callbacks()
        self.max_steps = module.stage.steps
        self.gradient_clip_val = clip
        self.save_at = save_at
        self.global_step = 0
        self.callback_metrics: dict[str, Any] = {}
        self.checkpoint: dict[str, Any] = {}
        self.profiler = PassThroughProfiler()
        device = torch.device("cpu")
        self.strategy = SingleDeviceStrategy(device, accelerator=CPUAccelerator(), precision_plugin=Precision())
        self.strategy.connect(module)
        module.trainer = self  # type: ignore[assignment]
        module.log_dict = self.log_dict  # type: ignore[method-assign]

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
        """Every number must be one, as the history demands it of losses."""
        for name, value in values.items():
            assert math.isfinite(float(value)), f"{name} is {float(value)}"
        self.callback_metrics |= values

    def run(self, checkpoint: Mapping[str, Any] | None = None) -> None:
        """From the first step to the last, or from the one after the checkpoint."""
        module = self.lightning_module
        module.model.train()
        self._call("setup", stage="fit")
        if checkpoint is not None:
            self._restore(checkpoint)
        self.strategy.setup_optimizers(self)  # type: ignore[arg-type]
        self._call("on_fit_start")
        if checkpoint is not None:
            self.strategy.load_optimizer_state_dict(checkpoint)
            self.global_step = int(checkpoint["global_step"])
        module.zero_grad()
        self._call("on_train_start")
        if checkpoint is None:
            self._call("on_train_epoch_start")
        for index, batch in self._batches():
            self._step(batch, index)
        self._call("on_train_epoch_end")
        self._call("on_train_end")
        self._call("on_fit_end")
        self._call("teardown", stage="fit")

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        module = self.lightning_module
        sampler = StageBatches(stage=module.stage, micro_batch=module.stage.batch_size, start=self.global_step)
        for index, positions in enumerate(sampler, self.global_step):
            examples = [module.dataset[position] for position in positions]
            yield index, module.objective.collate(examples, layout=module.layout)

    def _step(self, batch: Batch, index: int) -> None:
        module, (optimizer,) = self.lightning_module, self.optimizers
        self._call("on_train_batch_start", batch, index)
        output = {}

        @torch.enable_grad()
        def closure() -> torch.Tensor:
            loss = self.strategy.training_step(batch, index)
            output["loss"] = loss.detach()
            self._call("on_before_zero_grad", optimizer)
            module.optimizer_zero_grad(0, index, optimizer)
            self.strategy.backward(loss, optimizer)
            return output["loss"]

        module.optimizer_step(0, index, self.strategy._lightning_optimizers[0], closure)
        self.global_step += 1
        for config in self.lr_scheduler_configs:
            module.lr_scheduler_step(config.scheduler, None)
        self._call("on_train_batch_end", output, batch, index, then=self._save)

    def _save(self) -> None:
        """The checkpoint is the last of the callbacks."""
        if self.global_step != self.save_at:
            return
        checkpoint: dict[str, Any] = {"global_step": self.global_step}
        states = {callback.state_key: callback.state_dict() for callback in self.callbacks}
        checkpoint["callbacks"] = {key: state for key, state in states.items() if state}
        checkpoint["optimizer_states"] = [self.strategy.optimizer_state(optimizer) for optimizer in self.optimizers]
        checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in self.lr_scheduler_configs]
        self._call("on_save_checkpoint", checkpoint)
        self.checkpoint = stored(checkpoint)

    def _restore(self, checkpoint: Mapping[str, Any]) -> None:
        module = self.lightning_module
        module.on_load_checkpoint(checkpoint)
        for callback in self.callbacks:
            callback.on_load_checkpoint(self, module, checkpoint)  # type: ignore[arg-type]
        for callback in self.callbacks:
            if state := checkpoint["callbacks"].get(callback.state_key):
                callback.load_state_dict(copy.deepcopy(state))

    def _call(self, hook: str, *args: Any, then: Callable[[], None] | None = None, **named: Any) -> None:
        """A hook of the callbacks, then the module's."""
        module = self.lightning_module
        for callback in self.callbacks:
            getattr(callback, hook)(self, module, *args, **named)
        if then is not None:
            then()
        getattr(module, hook)(*args, **named)


def stored(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What `load_tree` gives after `save_tree`, without the file."""
    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(storage._encode(tree, "", tensors, set()))
    found: dict[str, Any] = storage._decode(json.loads(structure), {key: t.clone() for key, t in tensors.items()})
    return found
