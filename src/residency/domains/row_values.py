"""Rows as JSON values, for fingerprints and for other processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from residency.core.types import Row

__all__ = ["row_of", "row_values"]

_NAMES = ("id", "prompt", "completion", "group")
_PLAIN = {f.name: getattr(Row(id="", prompt="", completion=""), f.name) for f in fields(Row)}


def row_values(row: Row) -> list[Any]:
    """A row as JSON values: what every row has, then by name what this one has besides."""
    more = {f.name: getattr(row, f.name) for f in fields(Row) if f.name not in _NAMES}
    kept = {name: value for name, value in more.items() if value != _PLAIN[name]}
    return [getattr(row, name) for name in _NAMES] + ([kept] if kept else [])


def row_of(values: Sequence[Any]) -> Row:
    """The inverse of `row_values`, also after its lists and tuples have become one in JSON."""
    more: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in (values[4] if len(values) > 4 else {}).items()
    }
    return Row(id=values[0], prompt=values[1], completion=values[2], group=values[3], **more)
