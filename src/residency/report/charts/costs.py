"""What each method costs: time, extra state, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from residency.report.charts.theme import color_of, inline

__all__ = ["costs"]

Row = dict[str, Any]
_PANELS = (
    ("training seconds", 1.0, "training, s"),
    ("extra state bytes", 1e6, "extra state, MB"),
    ("peak memory bytes", 1e9, "peak memory, GB"),
    ("trainable parameters", 1e6, "trainable parameters, M"),
)


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
    panels: list[alt.LayerChart] = []
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
    return alt.hconcat(*panels, spacing=18) if panels else None
