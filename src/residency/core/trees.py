"""Trees of tensors and JSON values (nested mappings, lists, tuples) as plain values and named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["flatten_tree", "unflatten_tree"]


def flatten_tree(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tree as a JSON value and its tensors by path; no two of them share memory.

    Raises:
        TypeError: A leaf is neither a tensor nor a JSON value; the message names it.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _encode(tree, "", tensors, set()), tensors


def unflatten_tree(plain: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `flatten_tree`.

    Raises:
        KeyError: A tensor is missing.
    """
    return _decode(plain, tensors)


def _encode(value: Any, name: str, tensors: dict[str, torch.Tensor], memories: set[int]) -> Any:
    if isinstance(value, torch.Tensor):
        key = name or "value"
        if key in tensors:
            raise TypeError(f"two tensors would be stored under the name {key!r}")
        # A copy where memory is shared: safetensors stores every tensor by itself.
        owned = value.detach().contiguous()
        memory = owned.untyped_storage().data_ptr()
        tensors[key] = owned.clone() if memory in memories and owned.numel() else owned
        memories.add(memory)
        return {"$tensor": key}
    if isinstance(value, Mapping):
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        inner = {key: f"{name}/{key}" if name else str(key) for key in value}
        items = [
            [_encode(key, inner[key], tensors, memories), _encode(value[key], inner[key], tensors, memories)]
            for key in value
        ]
        return dict(items) if plain else {"$items": items}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{name}/{i}", tensors, memories) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{name or 'the tree'} holds a {type(value).__name__}: only tensors and JSON values can be stored")


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$items" in value:
        return {_decode(key, tensors): _decode(item, tensors) for key, item in value["$items"]}
    if "$tuple" in value:
        return tuple(_decode(item, tensors) for item in value["$tuple"])
    return {key: _decode(item, tensors) for key, item in value.items()}
