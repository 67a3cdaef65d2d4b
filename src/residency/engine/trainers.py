"""One fresh Trainer per stage: a second `fit` on one Trainer runs zero steps."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from copy import copy
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import Strategy

from residency.core.environment import keep_threads
from residency.core.errors import UserError
from residency.engine.checkpointing import SafetensorsIO
from residency.engine.rank_strategy import RankStrategy, end_in_place, ended_children, stage_strategy
from residency.engine.trainer_options import refuse_overwritten, refuse_senseless

__all__ = ["Trainers"]

T = TypeVar("T")


class Trainers:
    """Makes Trainers from the user's options.

    Args:
        options: Gives the keyword arguments of `Trainer`, with new callback objects every time it is called.
    """

    def __init__(self, options: Callable[[], dict[str, Any]] | None = None) -> None:
        self._options = options or dict

    def steps(self, *, rows: int, batch_size: int, own: tuple[int | None, int | None] = (None, None)) -> int:
        """Optimizer steps of a stage: `trainer.max_steps`, else `trainer.max_epochs` (1) times the domain.

        Args:
            rows: Of the domain.
            batch_size: Of the stage.
            own: (steps, epochs) of the stage itself, instead of the Trainer's.

        Raises:
            UserError: No positive number of steps.
        """
        options = self._values
        steps, epochs = options.get("max_steps", -1), options.get("max_epochs")
        if own != (None, None):
            steps, epochs = own
        # -1 is the Trainer's word for "as many as the epochs have".
        if steps is None or steps == -1:
            steps = math.ceil(rows / batch_size) * (1 if epochs is None else epochs)
        if steps < 1:
            raise UserError(
                f"trainer.max_steps={options.get('max_steps')}, trainer.max_epochs={epochs}",
                why="every domain needs at least one optimizer step",
                fix="set trainer.max_steps to the steps per domain, or trainer.max_epochs to at least 1",
            )
        return int(steps)

    @cached_property
    def _values(self) -> dict[str, Any]:
        # Read only; a Trainer is made from options with objects of its own.
        return self._options()

    @cached_property
    def _probe(self) -> Trainer:
        # Never fitted: tells devices and ranks before the first stage needs them, and whether there can be a Trainer.
        try:
            return self.make(steps=1, folder=Path("."), observers=[])
        except (ValueError, TypeError, ImportError, RuntimeError, MisconfigurationException) as error:
            raise UserError(
                f"trainer: {' '.join(str(error).split())}",
                why="Lightning's Trainer refuses these options on this machine",
                fix="correct trainer.accelerator, trainer.devices, trainer.strategy or trainer.precision",
            ) from error

    def check(self) -> None:
        """Make a Trainer now, so that a device that is not there stops a command before a model is loaded.

        Raises:
            UserError: Lightning refuses the options on this machine.
        """
        _ = self.root_device

    @property
    def root_device(self) -> torch.device:
        """Where this process computes."""
        return self._probe.strategy.root_device

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return self._probe.world_size

    @property
    def shards(self) -> bool:
        """Whether each of several processes keeps a part of the frozen weights only."""
        strategy = self._probe.strategy
        return isinstance(strategy, RankStrategy) and strategy.shards and self.world_size > 1

    def launch(self, function: Callable[[], T]) -> T:
        """Start the other processes, connect all of them, and run a function in each; in the first one, its result.

        Before anything else that has effects: the others run the whole command again up to here.
        """
        strategy = self._probe.strategy
        if not isinstance(strategy, RankStrategy):
            return function()
        keep_threads()
        launcher: Any = strategy.launcher

        def connected() -> T:
            with quiet_lightning():
                strategy.setup_environment()
            return function()

        with ended_children(launcher):
            result: T = launcher.launch(connected, trainer=self._probe)
            return result

    @property
    def precision(self) -> str:
        """As the Trainer calls it: `32-true`, `bf16-mixed`."""
        return str(self._probe.precision)

    @property
    def gradient_clip_val(self) -> float | None:
        """Norm or value that gradients are clipped to; `None` = not clipped."""
        value = self._values.get("gradient_clip_val")
        return None if value is None else float(value)

    @property
    def log_every_n_steps(self) -> int:
        """Steps between two lines of the history."""
        return int(self._values.get("log_every_n_steps") or 1)

    def make(self, *, steps: int, accumulate: int = 1, folder: Path, observers: list[Callback]) -> Trainer:
        """A Trainer for one stage.

        Args:
            steps: Optimizer steps.
            accumulate: Micro-batches per step.
            folder: Of the stage: unique, so that nothing of another stage is picked up.
            observers: New for every stage.

        Raises:
            UserError: An option that is overwritten here, or has no effect in a stream, was given.
        """
        options = self._options()
        refuse_overwritten(options)
        refuse_senseless(options)
        callbacks = [*(options.pop("callbacks", None) or []), *observers]
        if isinstance(options.get("strategy"), Strategy):
            # A Trainer writes into it, and would refuse what another one has written.
            options["strategy"] = copy(options["strategy"])
        plugins = options.pop("plugins", None) or []
        plugins = [*(plugins if isinstance(plugins, list) else [plugins]), SafetensorsIO()]
        options |= {
            "max_steps": steps,
            "max_epochs": 1,
            "accumulate_grad_batches": accumulate,
            "default_root_dir": folder,
            "callbacks": callbacks,
            "plugins": plugins,
            # Ours: the sampler knows ranks and steps, checkpoints and scores are written by the stream.
            "use_distributed_sampler": False,
            "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
            "num_sanity_val_steps": 0,
        }
        options.setdefault("logger", False)
        options.setdefault("enable_model_summary", False)
        options.setdefault("log_every_n_steps", 1)
        with quiet_lightning():
            trainer = Trainer(**options)
            if (strategy := stage_strategy(trainer.strategy)) is not None:
                trainer = Trainer(**options | {"strategy": strategy})
        if trainer.strategy.root_device.type == "cuda":
            trainer.strategy.teardown = partial(end_in_place, trainer.strategy)  # type: ignore[method-assign]
        # A batch holds token ids, positions and counts, which no precision converts; Lightning would look into it and
        # refuse a frozen dataclass.
        trainer.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]
        return trainer


class quiet_lightning:
    """Hide Lightning's advice that does not apply to a stream."""

    # The last one: our sampler starts where the checkpoint ended, so nothing has to be restored into the loader.
    _NOISE = (
        ".*does not have many workers.*",
        ".*The number of training batches.*",
        ".*`isinstance.treespec.*",
        ".*your dataloader is not resumable.*",
    )

    def __enter__(self) -> None:
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        for message in self._NOISE:
            warnings.filterwarnings("ignore", message=message)
        self._loggers = [logging.getLogger(n) for n in ("lightning.pytorch", "lightning.fabric")]
        self._levels = [log.level for log in self._loggers]
        for log in self._loggers:
            log.setLevel(logging.WARNING)

    def __exit__(self, *error: object) -> None:
        self._catch.__exit__(None, None, None)
        for log, level in zip(self._loggers, self._levels, strict=True):
            log.setLevel(level)
