"""A folder for adapters that no other library knows: constructor arguments as JSON, tensors as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from residency.adapters.base import Adapter
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree, read_json, save_tree, write_json
from residency.core.types import Tensors

__all__ = ["INNER", "attach_exported", "write_exported"]

INNER = "inner"
"""Folder of a PEFT adapter that works beside one of ours."""

_DESCRIPTION, _TENSORS = "residency_adapter.json", "residency_adapter.safetensors"


def write_exported(path: Path, adapter: Adapter, options: Mapping[str, Any], state: Tensors) -> None:
    """Write an adapter so that `attach_exported` restores it.

    Args:
        path: Folder; made if it is not there.
        adapter: Of a class that `residency.adapters` exports.
        options: Its constructor arguments, JSON values.
        state: Its tensors.
    """
    write_json(path / _DESCRIPTION, {"class": type(adapter).__name__, "options": dict(options)})
    save_tree(path / _TENSORS, {"state": dict(state)})


def attach_exported(model: nn.Module, path: str | Path) -> tuple[Adapter, nn.Module]:
    """Attach an exported adapter to the model it was trained on.

    Args:
        model: Freshly loaded with transformers.
        path: The exported folder.

    Returns:
        The adapter, and the model with it.

    Raises:
        UserError: The folder holds no such export, or one of another model.
    """
    from residency import adapters

    folder = Path(path)
    described = read_json(folder / _DESCRIPTION)
    # Only names that the package itself exports: a folder from elsewhere cannot choose what is imported.
    if described["class"] not in adapters.__all__ or described["class"] == "Adapter":
        raise UserError(
            f"{folder / _DESCRIPTION} names the adapter {described['class']!r}",
            why="residency has no adapter of that name",
            fix=f"use the version of residency that wrote it; this one has {', '.join(adapters.__all__)}",
        )
    adapter: Adapter = getattr(adapters, described["class"])(**described["options"])
    if (folder / INNER).is_dir():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / INNER)
    attached = adapter.attach(model)
    adapter.load_state(attached, load_tree(folder / _TENSORS)["state"])
    return adapter, attached
