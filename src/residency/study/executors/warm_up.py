"""What all tasks of a study do alike before they begin, done once in the process that they are forked from.

Of a one-step stage on a tiny model this is most: how classes are found and their signatures read, which names
checkpoints have, and what code a key stands for. Nothing is instantiated and nothing computes, so no thread starts.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

__all__ = ["warm_up"]

# What `wandb.init` and `wandb.Table` import when they are called: two seconds of every record.
_WANDB = ("wandb", "wandb.sdk.launch", "pandas")


def warm_up(spec: Mapping[str, Any]) -> None:
    """Fill the caches of this process for tasks like this one.

    What is wrong with the task is for the task to tell: whatever fails here is left out.

    Args:
        spec: As `run_task` takes it.
    """
    # Anything can be wrong with a config, and each task tells it where the user looks.
    with suppress(Exception, SystemExit):
        config = _parsed(["fit", *spec["words"]])
        if config["wandb"]["enabled"] and os.environ.get("WANDB_MODE") != "disabled":
            for name in _WANDB:
                import_module(name)
        from residency.runs.code_identity import class_code, core_code

        core_code()
        for path in dict.fromkeys(_class_paths(config)):
            module, _, name = path.rpartition(".")
            found = getattr(import_module(module), name)
            if isinstance(found, type):
                class_code(found)
    with suppress(Exception):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")
    gc.collect()
    gc.freeze()


def _parsed(words: list[str]) -> dict[str, Any]:
    """The resolved config of a command line; its classes are imported and none of them is instantiated."""
    from residency.runs.cli import ResidencyCLI

    class Parsed(ResidencyCLI):
        def instantiate_classes(self) -> None:
            pass

    return Parsed(words, run=False).resolved


def _class_paths(config: Any) -> Iterator[str]:
    """Every class that a resolved config names: parsing has imported them."""
    if isinstance(config, Mapping):
        if isinstance(path := config.get("class_path"), str):
            yield path
        for part in config.values():
            yield from _class_paths(part)
    elif isinstance(config, list):
        for part in config:
            yield from _class_paths(part)
