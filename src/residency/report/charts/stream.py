"""Scores over the stream, what became of each domain, and the training loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from residency.report.charts.theme import axis_scale, color_of, number_format
from residency.runs.views.chart_data import inline

__all__ = ["by_domain", "over_the_stream", "training_loss"]

Row = dict[str, Any]
_PANEL = 250


def _series(names: Sequence[str], chosen: str | None, baseline: str | None) -> tuple[alt.Color, alt.Shape]:
    color, shape = color_of(names, chosen=chosen, baseline=baseline)
    legend = alt.Legend(title=None, orient="top", columns=4, symbolSize=110)
    return alt.Color("method:N", scale=color, legend=legend), alt.Shape("method:N", scale=shape, legend=legend)


def over_the_stream(
    rows: Sequence[Row], *, chosen: str | None, baseline: str | None, unit: str, higher: bool
) -> alt.FacetChart:
    """Every domain's score after every stage; the dashed line marks when the domain itself was learnt.

    Args:
        rows: method, stage, after, column, probe, learned, score.
        chosen: The recommended method.
        baseline: The baseline.
        unit: Of the scores, with the scorer.
        higher: Whether higher is better.
    """
    names = list(dict.fromkeys(row["method"] for row in rows))
    columns = list(dict.fromkeys(row["column"] for row in rows))
    known = [row for row in rows if row["score"] is not None]
    # Orders of domains differ between methods: then the position is all that stages have in common.
    labels: dict[int, set[str]] = {}
    for row in known:
        labels.setdefault(row["stage"], set()).add(row["after"])
    data = [{**row, "at": _stage(row, labels)} for row in known]
    stages = [d["at"] for d in sorted(data, key=lambda d: d["stage"])]
    color, shape = _series(names, chosen, baseline)
    axis = alt.Axis(labelAngle=-30 if max(map(len, stages), default=0) > 8 else 0, labelLimit=110)
    x = alt.X("at:O", sort=list(dict.fromkeys(stages)), title="after learning", axis=axis)
    better = "higher is better" if higher else "lower is better"
    scale = axis_scale([row["score"] for row in known])
    y = alt.Y(
        "score:Q", title=f"{unit} ({better})", scale=scale, axis=alt.Axis(tickCount=5, format="~g", titleLimit=220)
    )
    digits = number_format([row["score"] for row in known])
    tooltip = [alt.Tooltip("method:N"), alt.Tooltip("at:N", title="after"), alt.Tooltip("score:Q", format=digits)]
    base = alt.Chart().encode(x=x, y=y)
    layer = alt.layer(
        alt.Chart().mark_rule(strokeDash=[4, 4], opacity=0.8).encode(x=x).transform_filter("datum.learned"),
        base.mark_line(strokeWidth=2.2).encode(color=color),
        base.mark_point(size=70, filled=True, opacity=1).encode(color=color, shape=shape, tooltip=tooltip),
    ).properties(width=_PANEL, height=190)
    facet = alt.Facet("column:N", sort=columns, header=alt.Header(title=None, labelLimit=_PANEL))
    chart: alt.FacetChart = layer.facet(facet, data=inline(data), columns=3)
    return chart


def _stage(row: Row, labels: dict[int, set[str]]) -> str:
    name = str(row["after"]) if len(labels[row["stage"]]) == 1 else f"domain {row['stage']}"
    return "base" if row["stage"] == 0 else f"{row['stage']} {name}"


def by_domain(
    rows: Sequence[Row], *, chosen: str | None, baseline: str | None, unit: str, higher: bool
) -> alt.FacetChart:
    """Per domain: hollow = right after learning, filled = at the end.

    Args:
        rows: method, domain, learned, end.
        chosen: The recommended method.
        baseline: The baseline.
        unit: Of the scores, with the scorer.
        higher: Whether higher is better.
    """
    names = list(dict.fromkeys(row["method"] for row in rows))
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    color, _ = color_of(names, chosen=chosen, baseline=baseline)
    digits = number_format([row[k] for row in rows for k in ("learned", "end")])
    y = alt.Y("method:N", sort=names, title=None, axis=alt.Axis(labelLimit=180))
    better = "higher is better →" if higher else "← lower is better"
    x = alt.X(
        "end:Q",
        title=f"{unit} ({better})",
        scale=axis_scale([row[k] for row in rows for k in ("end", "learned")], padding=14),
    )
    shade = alt.Color("method:N", scale=color, legend=None)
    tooltip = [alt.Tooltip("method:N"), *(alt.Tooltip(f"{k}:Q", format=digits) for k in ("before", "learned", "end"))]
    base = alt.Chart().encode(y=y, color=shade, tooltip=tooltip)
    layer = alt.layer(
        base.mark_rule(strokeWidth=3, opacity=0.45).encode(x=x, x2="learned:Q"),
        base.mark_point(size=80, filled=False, strokeWidth=2, opacity=1).encode(x="learned:Q"),
        base.mark_point(size=100, filled=True, opacity=1).encode(x=x),
    ).properties(width=_PANEL - 20, height=max(90, 30 * len(names)))
    facet = alt.Facet("domain:N", sort=domains, header=alt.Header(title=None, labelLimit=_PANEL))
    chart: alt.FacetChart = layer.facet(facet, data=inline(rows), columns=3)
    return chart


def training_loss(rows: Sequence[Row], *, chosen: str | None, baseline: str | None) -> alt.LayerChart:
    """The task's loss over all steps of the stream.

    Args:
        rows: method, stream_step, stage, loss.
        chosen: The recommended method.
        baseline: The baseline.
    """
    names = list(dict.fromkeys(row["method"] for row in rows))
    color, _ = _series(names, chosen, baseline)
    starts: dict[int, int] = {}
    for row in rows:
        starts[row["stage"]] = min(row["stream_step"], starts.get(row["stage"], row["stream_step"]))
    scale = axis_scale([row["loss"] for row in rows], padding=6)
    x = alt.X(
        "stream_step:Q", title="step of the stream (dashed: the next domain begins)", axis=alt.Axis(tickMinStep=1)
    )
    y = alt.Y("loss:Q", title="training loss, nats per token", scale=scale, axis=alt.Axis(tickCount=5, format="~g"))
    # One line per stage: between two domains nothing was measured.
    line = alt.Chart(inline(rows)).mark_line(strokeWidth=1.8).encode(x=x, y=y, color=color, detail="stage:N")
    rules = alt.Chart(inline([{"stream_step": s} for k, s in starts.items() if k > 1]))
    marks = rules.mark_rule(strokeDash=[4, 4], opacity=0.8).encode(x=x)
    return alt.LayerChart(layer=[marks, line], width=780, height=220)
