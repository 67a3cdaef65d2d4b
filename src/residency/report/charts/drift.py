"""What observers found inside the model: over the stages, and block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import altair as alt

from residency.report.charts.theme import color_of
from residency.report.records.arms import Arm
from residency.runs.views.chart_data import inline
from residency.runs.views.tables import finite, printable

__all__ = ["blocks", "by_block", "findings", "over_stages"]

Row = dict[str, Any]
# Findings in the order of interest, with what they are called; what is not named here is not drawn.
_CALLED = {
    "frobenius": "‖ΔW‖ / ‖W‖",
    "mean": "mean",
    "percent": "backbone, % moved",
    "cv": "gradient norms, sd / mean",
    "stability_gap": "stability gap of old domains, nats",
    "ece": "calibration error (ECE)",
    "brier": "Brier score",
    "stable_rank": "stable rank of ΔW",
    "cosine": "cosine with the stage before",
}
_PANELS = 9


def findings(arm: Arm) -> Iterator[Row]:
    """method, stage, after, panel, value: every finding that is one number, or one per column, averaged over seeds."""
    found: dict[tuple[int, str, str], list[float]] = {}
    for entry in arm.done:
        after = ["base", *entry.record["domains"]]
        for stage, observers in enumerate(entry.record.get("inside") or []):
            for name, facts in observers.items():
                for key, value in _numbers(facts):
                    found.setdefault(
                        (stage, printable(after[stage], 30), f"{printable(name, 24)}: {_CALLED[key]}"), []
                    ).append(value)
    for (stage, after_name, panel), values in found.items():
        yield {"method": arm.name, "stage": stage, "after": after_name, "panel": panel, "value": fmean(values)}


def _numbers(facts: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    columns = facts.get("columns") or {}
    for key in _CALLED:
        value = finite(facts.get(key))
        if value is None:
            inner = [finite(c.get(key)) for c in columns.values() if isinstance(c, Mapping)]
            known = [v for v in inner if v is not None]
            value = fmean(known) if known else None
        if value is not None:
            yield key, value


def over_stages(rows: Sequence[Row], *, chosen: str | None, baseline: str | None) -> alt.FacetChart:
    """One panel per finding.

    Args:
        rows: As `findings` gives them.
        chosen: The recommended method.
        baseline: The baseline.
    """
    names = list(dict.fromkeys(row["method"] for row in rows))
    panels = list(dict.fromkeys(row["panel"] for row in rows))[:_PANELS]
    data = [{**row, "at": "base" if row["stage"] == 0 else f"{row['stage']} {row['after']}"} for row in rows]
    data = [row for row in data if row["panel"] in panels]
    color, shape = color_of(names, chosen=chosen, baseline=baseline)
    legend = alt.Legend(title=None, orient="top", columns=4, symbolSize=110)
    order = list(dict.fromkeys(row["at"] for row in sorted(data, key=lambda row: row["stage"])))
    x = alt.X("at:O", sort=order, title="after learning", axis=alt.Axis(labelAngle=-30, labelLimit=110))
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5, format="~g"))
    shade = alt.Color("method:N", scale=color, legend=legend)
    tooltip = [alt.Tooltip("method:N"), alt.Tooltip("at:N", title="after"), alt.Tooltip("value:Q", format=".4~g")]
    base = alt.Chart().encode(x=x, y=y, color=shade)
    layer = alt.layer(
        base.mark_line(strokeWidth=2),
        base.mark_point(size=70, filled=True, opacity=1).encode(
            shape=alt.Shape("method:N", scale=shape, legend=legend), tooltip=tooltip
        ),
    ).properties(width=250, height=150)
    facet = alt.Facet("panel:N", sort=panels, header=alt.Header(title=None, labelLimit=250))
    chart: alt.FacetChart = layer.facet(facet, data=inline(data), columns=3).resolve_scale(y="independent")
    return chart


def blocks(arm: Arm) -> Iterator[Row]:
    """method, panel, block, value at the end of the stream, averaged over seeds."""
    found: dict[tuple[str, int], list[float]] = {}
    for entry in arm.done:
        inside = entry.record.get("inside") or [{}]
        for name, facts in inside[-1].items():
            for block, value in enumerate(facts.get("by_block") or []):
                number = finite(value)
                if number is not None:
                    found.setdefault((printable(name, 24), block), []).append(number)
    for (panel, block), values in found.items():
        yield {"method": arm.name, "panel": panel, "block": block, "value": fmean(values)}


def by_block(rows: Sequence[Row], *, chosen: str | None, baseline: str | None) -> alt.FacetChart:
    """Drift over the blocks of the model.

    Args:
        rows: As `blocks` gives them.
        chosen: The recommended method.
        baseline: The baseline.
    """
    names = list(dict.fromkeys(row["method"] for row in rows))
    color, shape = color_of(names, chosen=chosen, baseline=baseline)
    legend = alt.Legend(title=None, orient="top", columns=4, symbolSize=110)
    x = alt.X("block:Q", title="block", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(zero=False, nice=False))
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=5, format="~g"))
    base = alt.Chart().encode(x=x, y=y, color=alt.Color("method:N", scale=color, legend=legend))
    marks = base.mark_point(size=45, filled=True, opacity=1)
    layer = alt.layer(
        base.mark_line(strokeWidth=2),
        marks.encode(shape=alt.Shape("method:N", scale=shape, legend=legend)),
    ).properties(width=380, height=190)
    facet = alt.Facet("panel:N", header=alt.Header(title=None))
    chart: alt.FacetChart = layer.facet(facet, data=inline(rows), columns=2).resolve_scale(y="independent")
    return chart
