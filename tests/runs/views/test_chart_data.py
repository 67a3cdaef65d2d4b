"""Shared parts of charts write what parts of their own write, and are copied nowhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import altair as alt

from residency.runs.views.chart_data import inline, shared

ROWS = [{"name": "a", "value": 1}, {"name": "b", "value": 2}]


def _layered(data: alt.InlineData, part: Callable[[Any], Any]) -> alt.ConcatChart:
    x, color = part(alt.X("name:O", sort=None)), part(alt.Color("value:Q", scale=alt.Scale(domain=[0, 2])))
    base = alt.Chart(data).encode(x=x)
    layers = alt.layer(base.mark_rect().encode(color=color), base.mark_text().encode(text="name:N"))
    return alt.concat(layers, layers.properties(width=90), title="both").configure(font="serif")


def test_a_chart_of_shared_parts_is_the_same_chart() -> None:
    own = _layered(alt.InlineData(values=[dict(row) for row in ROWS]), lambda part: part)
    assert _layered(inline(ROWS), shared).to_dict() == own.to_dict()


def test_a_copy_holds_the_same_rows() -> None:
    data = inline(ROWS)
    chart = alt.Chart(data).mark_point()
    assert chart.copy().data is data
    assert data.values[0] is not ROWS[0]
