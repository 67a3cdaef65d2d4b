"""What each method costs: time, extra state, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from residency.report.charts.theme import color_of
from residency.runs.views.chart_data import inline

__all__ = ["costs"]

Row = dict[str, Any]
# The parts of the time, whose sum is "seconds"; what a mitigation does before and after the steps is its price too.
_PARTS = {
    "seconds before the first steps": "prepare",
    "training seconds": "steps",
    "seconds after the last steps": "finish",
    "scoring seconds": "scoring",
}
_PART_COLORS = ["#8a6fc0", "#1f83c4", "#b98500", "#808a93"]
_PANELS = (
    ("seconds", 1.0, "all, s"),
    ("extra state bytes", 1e6, "extra state, MB"),
    ("peak memory bytes", 1e9, "peak memory, GB"),
    ("trainable parameters", 1e6, "trainable parameters, M"),
)


def _times(rows: Sequence[Row], names: Sequence[str]) -> alt.Chart:
    """The time in its parts, one bar per method."""
    data = [
        {"method": row["method"], "part": part, "s": row[key], "order": number}
        for row in rows
        for number, (key, part) in enumerate(_PARTS.items())
        if row.get(key)
    ]
    color = alt.Color(
        "part:N",
        scale=alt.Scale(domain=list(_PARTS.values()), range=_PART_COLORS),
        legend=alt.Legend(title=None, orient="bottom"),
    )
    chart = alt.Chart(inline(data)).mark_bar(height={"band": 0.6})
    y = alt.Y("method:N", sort=list(names), title=None, axis=alt.Axis(ticks=False, domain=False, labelLimit=180))
    x = alt.X("s:Q", title="time in parts, s", axis=alt.Axis(tickCount=3))
    tooltip = [alt.Tooltip("method:N"), alt.Tooltip("part:N"), alt.Tooltip("s:Q", format=",.1f", title="seconds")]
    made: alt.Chart = chart.encode(x=x, y=y, color=color, order="order:O", tooltip=tooltip)
    return made.properties(width=165, height=max(80, 28 * len(names)))


def _scale_to(end: float) -> alt.Scale:
    """From 0, with room for the number behind the longest bar."""
    return alt.Scale(domain=[0, end], nice=False)


def costs(rows: Sequence[Row], *, chosen: str | None, baseline: str | None) -> alt.HConcatChart | None:
    """A row of bars per cost that is known; `None` if none is.

    Args:
        rows: method and the costs of the table.
        chosen: The recommended method.
        baseline: The baseline.
    """
    names = [row["method"] for row in rows]
    color, _ = color_of(names, chosen=chosen, baseline=baseline)
    panels: list[alt.LayerChart | alt.Chart] = [_times(rows, names)] if any(row.get("seconds") for row in rows) else []
    for key, scale, title in _PANELS:
        data = [{"method": r["method"], "v": r[key] / scale} for r in rows if r.get(key) is not None]
        if not data or not any(row["v"] for row in data):
            continue
        for row in data:
            row["text"] = f"{row['v']:,.3g}" if row["v"] < 1000 else f"{row['v']:,.0f}"
        side = alt.Axis(labels=not panels, ticks=False, domain=False, labelLimit=180)
        y = alt.Y("method:N", sort=names, title=None, axis=side)
        x = alt.X("v:Q", title=title, axis=alt.Axis(tickCount=3), scale=_scale_to(1.4 * max(row["v"] for row in data)))
        base = alt.Chart(inline(data)).encode(x=x, y=y)
        shade = alt.Color("method:N", scale=color, legend=None)
        layers = [
            base.mark_bar(height={"band": 0.6}).encode(color=shade),
            base.mark_text(align="left", dx=5, fontSize=12).encode(text="text:N"),
        ]
        panels.append(alt.LayerChart(layer=layers, width=165, height=max(80, 28 * len(names))))
    # Parts of the time and methods have colours of their own.
    return alt.hconcat(*panels, spacing=18).resolve_scale(color="independent") if panels else None
