"""Options of Lightning's Trainer that a stream overwrites or never asks: refused instead of silently without effect."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from residency.core.errors import UserError

__all__ = ["refuse_overwritten", "refuse_senseless"]

_OWN_LOOP = "a stage ends after its own number of optimizer steps, and its domain counts as learned then"
_NO_VALIDATION = "the Trainer has no validation loop here: every domain is scored after every stage"
_STEPS = "set trainer.max_steps (per domain) or trainer.max_epochs"
_SCORES = "leave it out; data.domains and evaluation say what is scored"

# Option -> (why it would have no effect or end a stage in the middle, what to type instead).
_OVERWRITTEN: dict[str, tuple[str, str]] = {
    "accumulate_grad_batches": (
        "how many micro-batches make a step follows from the sizes of the batches, and changes no gradient",
        "set data.micro_batch_size to the examples per forward pass, and data.batch_size to those per step",
    ),
    "use_distributed_sampler": ("the order of the rows is a function of seed, stage and step", "leave it out"),
    "enable_checkpointing": (
        "what is stored and when is the stream's own",
        "set checkpoint_every_n_steps (0 = no checkpoints inside of a stage)",
    ),
    "default_root_dir": ("every stage has a folder of its own inside of the run's", "set --run_dir"),
    "num_sanity_val_steps": (_NO_VALIDATION, _SCORES),
    "limit_val_batches": (_NO_VALIDATION, _SCORES),
    "val_check_interval": (_NO_VALIDATION, _SCORES),
    "check_val_every_n_epoch": (_NO_VALIDATION, _SCORES),
    "limit_test_batches": (_NO_VALIDATION, _SCORES),
    "limit_predict_batches": (_NO_VALIDATION, _SCORES),
    "inference_mode": (_NO_VALIDATION, "leave it out"),
    "reload_dataloaders_every_n_epochs": ("a stage is one pass of its own loader", "leave it out"),
    "min_steps": (_OWN_LOOP, _STEPS),
    "min_epochs": (_OWN_LOOP, _STEPS),
    "max_time": (_OWN_LOOP, _STEPS),
    "limit_train_batches": (_OWN_LOOP, _STEPS),
    "overfit_batches": (_OWN_LOOP, f"{_STEPS}, and the domain's max_train"),
    "fast_dev_run": (_OWN_LOOP, "set trainer.max_steps to 1"),
    "barebones": ("history and checkpoints are callbacks, which it forbids", "leave it out"),
    "model_registry": ("the Trainer stores no checkpoints of its own", "leave it out"),
}

# Other values than the default that ask for what happens anyway.
_HARMLESS: dict[str, Any] = {
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    **dict.fromkeys(("limit_train_batches", "limit_val_batches", "limit_test_batches", "val_check_interval"), 1.0),
}


# Option -> what it must be.
_NUMBERS: dict[str, tuple[float, str]] = {
    "gradient_clip_val": (0, "gradients are clipped to it; 0 or null = they are not clipped"),
    "log_every_n_steps": (1, "it counts optimizer steps between two lines of the history"),
}


def refuse_senseless(options: Mapping[str, Any]) -> None:
    """Numbers that the Trainer takes and that mean nothing.

    Args:
        options: Keyword arguments of `Trainer` as the user gave them.

    Raises:
        UserError: Naming the option, what it is, and what to type instead.
    """
    for name, (least, why) in _NUMBERS.items():
        value = options.get(name)
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= least):
            raise UserError(f"trainer.{name}={value}", why=why, fix=f"give a finite number of at least {least}")


def refuse_overwritten(options: Mapping[str, Any]) -> None:
    """Every option that a stream overwrites must be at the Trainer's default, so that nothing is silently ignored.

    Args:
        options: Keyword arguments of `Trainer` as the user gave them.

    Raises:
        UserError: Parameters in float16; or naming the option, why it cannot act, and what to type instead.
    """
    defaults = {name: p.default for name, p in inspect.signature(Trainer.__init__).parameters.items()}
    if str(options.get("precision")) == "16-true":
        raise UserError(
            "trainer.precision=16-true",
            why="Adam's epsilon of 1e-8 is 0 in float16, so that parameters become NaN, and nothing scales the loss",
            fix="set trainer.precision to bf16-true, or to 16-mixed or bf16-mixed, which keep parameters in float32",
        )
    for name, (why, fix) in _OVERWRITTEN.items():
        value = options.get(name)
        if value is not None and value not in (defaults[name], _HARMLESS.get(name)):
            raise UserError(f"trainer.{name}={value}", why=why, fix=fix)
