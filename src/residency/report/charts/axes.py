"""Two axes as a grid, one numeric setting as a curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from residency.report.charts.theme import axis_scale, color_of, number_format
from residency.runs.views.chart_data import inline

__all__ = ["grid", "sensitivity"]

Row = dict[str, Any]
_RAMP = ["#f3f7fb", "#c9ddf0", "#8fc1de", "#4a98c9", "#1d6cb1", "#08306b"]


def grid(
    rows: Sequence[Row], *, first: str, second: str, metric: str, unit: str, less_is_better: bool
) -> alt.LayerChart:
    """Two axes of a study against each other; the darker the better, each cell with its number.

    Args:
        rows: row, column, value.
        first: Name of the axis down.
        second: Name of the axis across.
        metric: What the numbers are.
        unit: Of the numbers.
        less_is_better: Their direction.
    """
    values = [row["value"] for row in rows]
    low, high = min(values), max(values)
    high = high if high > low else low + 1
    digits = number_format(values)
    data = []
    for row in rows:
        share = (row["value"] - low) / (high - low)
        dark = (1 - share if less_is_better else share) > 0.6
        data.append({**row, "text": format(row["value"], digits), "ink": "white" if dark else "#1a1a1a"})
    x_names, y_names = ([*dict.fromkeys(row[k] for row in rows)] for k in ("column", "row"))
    x = alt.X("column:N", sort=x_names, title=second, axis=alt.Axis(orient="top", labelAngle=0, labelLimit=120))
    y = alt.Y("row:N", sort=y_names, title=first)
    ramp = _RAMP[::-1] if less_is_better else _RAMP
    scale = alt.Scale(domain=[low, high], range=ramp)
    legend = alt.Legend(title=f"{metric}", gradientLength=140, format=".3~g")
    base = alt.Chart(inline(data)).encode(x=x, y=y)
    tooltip = [
        alt.Tooltip("row:N", title=first),
        alt.Tooltip("column:N", title=second),
        alt.Tooltip("text:N", title=unit),
    ]
    layers = [
        base.mark_rect().encode(color=alt.Color("value:Q", scale=scale, legend=legend), tooltip=tooltip),
        base.mark_text(fontSize=13).encode(text="text:N", color=alt.Color("ink:N", scale=None)),
    ]
    width = max(80, min(120, 9 * max(map(len, x_names))))
    chart = alt.LayerChart(layer=layers, width=width * len(x_names), height=38 * len(y_names))
    # The ink of a number has no scale, and Vega-Lite cannot merge that with the one of the cells.
    resolved: alt.LayerChart = chart.resolve_scale(color="independent")
    return resolved


def sensitivity(rows: Sequence[Row], *, setting: str, unit: str, higher: bool) -> alt.HConcatChart:
    """Score at the end, learning and forgetting over a numeric setting, one line per group.

    Args:
        rows: group, x, average, learning, forgetting, with optional low and high of each.
        setting: Name of the setting.
        unit: Of the scores.
        higher: Whether higher scores are better.
    """
    groups = list(dict.fromkeys(row["group"] for row in rows))
    color, shape = color_of(groups, chosen=None, baseline=None)
    xs = [row["x"] for row in rows]
    x = alt.X("x:Q", title=setting, scale=axis_scale(xs), axis=alt.Axis(values=sorted(set(xs)), format="~g"))
    better = "higher is better" if higher else "lower is better"
    titles = {"average": f"score at the end ({better})", "learning": f"right after learning ({better})"}
    panels = []
    for metric, title in (titles | {"forgetting": "forgetting (lower is better)"}).items():
        own = [row for row in rows if row.get(metric) is not None and not math.isnan(row[metric])]
        tooltip = [alt.Tooltip("group:N"), alt.Tooltip("x:Q", title="value"), alt.Tooltip(f"{metric}:Q", format=".3f")]
        y = alt.Y(f"{metric}:Q", title=f"{title}", scale=alt.Scale(zero=False))
        legend = alt.Legend(title=None, orient="bottom") if len(groups) > 1 else None
        shade = alt.Color("group:N", scale=color, legend=legend)
        base = alt.Chart(inline(own)).encode(x=x, y=y, color=shade)
        layers = [
            *(
                [base.mark_rule(opacity=0.6).encode(y=f"{metric} low:Q", y2=f"{metric} high:Q")]
                if _ranged(own, metric)
                else []
            ),
            base.mark_line(strokeWidth=2),
            base.mark_point(size=80, filled=True, opacity=1).encode(
                shape=alt.Shape("group:N", scale=shape, legend=legend), tooltip=tooltip
            ),
        ]
        panels.append(alt.LayerChart(layer=layers, width=250, height=200))
    return alt.hconcat(*panels)


def _ranged(rows: Sequence[Row], metric: str) -> bool:
    return any(row.get(f"{metric} low") is not None for row in rows)
