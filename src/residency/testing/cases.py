"""One property of one row: what a property function is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from residency.core.errors import UserError
from residency.testing.shared_runs import SharedRuns

__all__ = ["Case", "made"]

RowT = TypeVar("RowT")


@dataclass(frozen=True, kw_only=True)
class Case(Generic[RowT]):
    """What a property looks at.

    Args:
        name: Of the row.
        row: The row.
        runs: What the properties of all rows share.
        folder: Empty, for this property of this row alone.
        partner: Name of the row that is combined with this one, where a property is about a pair.
    """

    name: str
    row: RowT
    runs: SharedRuns
    folder: Path
    partner: str = ""


def made(make: Callable[..., Any], kind: type[Any], name: str, *args: Any) -> Any:
    """What a row makes.

    Raises:
        UserError: It is nothing of the row's kind.
    """
    part = make(*args)
    if not isinstance(part, kind):
        raise UserError(
            f"the row {name!r} makes {type(part).__name__}",
            why=f"it is no {kind.__name__} ({kind.__module__})",
            fix=f"let the class inherit from {kind.__name__}, or give the row to the argument of its own kind",
        )
    return part
