"""Building objects from a config: quietly, and with the errors of the classes themselves."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from residency.core.errors import UserError
from residency.runs.config.explain import UNION

__all__ = ["TRAINER_DEFAULTS", "Verbs", "build_classes", "build_trainer_options", "building"]

TRAINER_DEFAULTS = {
    "logger": False,
    "devices": 1,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "log_every_n_steps": 1,
    "gradient_clip_val": 1.0,
}


class Verbs:
    """Verbs that Lightning's Trainer does not have; their options are added by hand."""

    def export(self) -> None:
        """Write a saved stage."""


@contextmanager
def building() -> Iterator[None]:
    """Around jsonargparse's instantiation: what a class says itself counts, not what jsonargparse makes of it.

    Raises:
        UserError: As the class raised it, or from the `ValueError` of a class that is not ours.
    """
    try:
        with warnings.catch_warnings():
            # LoraConfig warns about its own default once jsonargparse spells it out.
            warnings.filterwarnings("ignore", message=".*loftq_config.*")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    except Exception as error:
        root: BaseException = error
        while str(root).startswith(UNION) and root.__cause__ is not None:
            root = root.__cause__
        if not isinstance(root, ValueError):
            raise root from root.__cause__
        raise UserError(
            f"{_constructed(root)}: {' '.join(str(root).split())}",
            why="the class refuses the values that the config gives it",
            fix="correct them; `--print_config` shows what it is given",
        ) from root


def build_classes(parser: LightningArgumentParser, config: Namespace, *, of: Namespace) -> Any:
    """The objects of a command.

    Args:
        parser: Of the whole command line.
        config: As it was parsed.
        of: The part of it that belongs to the verb.

    Raises:
        UserError: A section is no mapping, or a class refuses its values.
    """
    for section in ("trainer", "evaluation", "wandb"):
        if section in of and not isinstance(of[section], Namespace):
            raise UserError(
                f"{section}: {of[section]!r}",
                why="it is a section, with a key for each of its settings",
                fix=f"leave it out, or write its keys below it; `residency fit --help` lists {section}.KEY",
            )
    with building():
        return parser.instantiate_classes(config)


def build_trainer_options(config: Namespace) -> dict[str, Any]:
    """Arguments of a Trainer, with callbacks and loggers that no other Trainer has.

    Args:
        config: The parsed `trainer` section.
    """
    with building():
        built = _trainer_parser().instantiate_classes(Namespace(trainer=copy.deepcopy(config)))
    return dict(vars(built["trainer"]))


@cache
def _trainer_parser() -> LightningArgumentParser:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(Trainer, "trainer")
    return parser


def _constructed(error: BaseException) -> str:
    """The class in whose constructor an error arose."""
    trace, name = error.__traceback__, "the config"
    while trace is not None:
        code, local = trace.tb_frame.f_code, trace.tb_frame.f_locals
        if code.co_name in ("__init__", "__post_init__") and "self" in local:
            name = type(local["self"]).__name__
        trace = trace.tb_next
    return name
