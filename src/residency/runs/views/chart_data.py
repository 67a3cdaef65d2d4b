"""Parts of a chart that all copies of it share: Altair copies a chart whenever it is layered, set beside another,
configured or written, which is ten times for a heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import altair as alt

__all__ = ["inline", "shared"]

PartT = TypeVar("PartT", bound=alt.SchemaBase)


def inline(rows: Sequence[Mapping[str, Any]]) -> alt.InlineData:
    """Rows as data inside of a chart; they are copied once, here."""
    return shared(alt.InlineData(values=[dict(row) for row in rows]))


def shared(part: PartT) -> PartT:
    """The part itself, which stands in every copy of a chart from now on; it is not to be changed."""
    # An attribute of the object: assignment to a part sets a property of the chart.
    object.__setattr__(part, "__deepcopy__", lambda memo: part)
    return part
