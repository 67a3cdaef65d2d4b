"""What must hold for the files of a model: weights that can be read without running code, and all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from residency.core.errors import UserError

__all__ = ["check_files", "check_weights"]


def check_files(folder: Path, loader: str) -> None:
    """A model folder has its weights in safetensors.

    Args:
        folder: Of the model.
        loader: Class of transformers that would load it, for the message.

    Raises:
        UserError: It has them in pickles, or nowhere.
    """
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} has its weights in {pickles[0]}, not in *.safetensors",
            why="such a file is a pickle, which can run any code when it is opened; residency opens none",
            fix=f'convert it where you trust it: python -c "from transformers import {loader} as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\", copy the tokenizer's files "
            "beside it, and give that folder",
        )
    raise UserError(
        f"{folder} has no *.safetensors",
        why="a model needs its weights; without them all of it would be drawn at random",
        fix="give the folder as `save_pretrained` writes it, with all its files",
    )


def check_weights(folder: Path, chosen: str, info: Mapping[str, Any]) -> None:
    """Nothing in a model comes from neither files nor seed.

    Args:
        folder: Of the model.
        chosen: Name of its class.
        info: What `from_pretrained` says of the loading.

    Raises:
        UserError: Weights are missing, unknown, unreadable or of another shape.
    """
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in info.get("mismatched_keys", ())]
    problems = {
        "are missing": sorted(info.get("missing_keys", ())),
        "have another shape": sorted(mismatched),
        "are unknown to it": sorted(info.get("unexpected_keys", ())),
        "cannot be read": sorted(map(str, info.get("error_msgs", ()))),
    }
    told = [f"{len(keys)} {problem} ({_first(keys)})" for problem, keys in problems.items() if keys]
    if told:
        raise UserError(
            f"{folder} as {chosen}: of its weights {', '.join(told)}",
            why="what is missing would be drawn at random, another one at every load, and what is unknown be left out",
            fix="give the checkpoint that belongs to this config.json; for a base model without head the one with it",
        )


def _first(keys: Iterable[str]) -> str:
    names = list(keys)
    return ", ".join(names[:3]) + (", ..." if names[3:] else "")
