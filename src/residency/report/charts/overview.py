"""What a reader sees first: learnt and kept, stability against plasticity, differences to the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from residency.report.charts.theme import BASELINE, CHOSEN, color_of, number_format
from residency.runs.views.chart_data import inline

__all__ = ["forest", "learned_and_kept", "pareto", "plane"]

Row = dict[str, Any]
_WIDTH = 560


def learned_and_kept(
    rows: Sequence[Row], *, chosen: str | None, unit: str, higher: bool, references: Sequence[Row] = ()
) -> alt.LayerChart:
    """One line per method from the score right after learning (hollow) to the score at the end (filled).

    Args:
        rows: method, learning, average; best first.
        chosen: The recommended method.
        unit: Of the scores, with the scorer.
        higher: Whether higher is better.
        references: method, average: drawn as vertical lines.
    """
    names = [row["method"] for row in rows]
    digits = number_format([row[k] for row in rows for k in ("learning", "average")])
    data = [
        {**row, "text": format(row["average"], digits), "shade": _shade(row, chosen), "from": row.get("learning")}
        for row in rows
    ]
    y = alt.Y("method:N", sort=names, title=None, axis=alt.Axis(labelLimit=220, domain=False, ticks=False))
    better = "higher is better →" if higher else "← lower is better"
    scale = alt.Scale(zero=False, nice=True, padding=28)
    x = alt.X("average:Q", title=f"{unit}   ({better})", scale=scale)
    base = alt.Chart(inline(data)).encode(y=y, color=alt.Color("shade:N", scale=None))
    tooltip = [alt.Tooltip("method:N"), alt.Tooltip("from:Q", format=digits, title="right after learning")]
    tooltip.append(alt.Tooltip("average:Q", format=digits, title="at the end"))
    layers: list[alt.Chart] = [
        base.mark_rule(strokeWidth=4, opacity=0.45).encode(x=x, x2="from:Q"),
        base.mark_point(size=110, filled=False, strokeWidth=2.5, opacity=1).encode(x="from:Q", tooltip=tooltip),
        base.mark_point(size=150, filled=True, opacity=1).encode(x=x, tooltip=tooltip),
        base.mark_text(dy=-15, fontSize=13, fontWeight="bold").encode(x=x, text="text:N"),
    ]
    for number, row in enumerate(sorted(references, key=lambda row: row["average"])):
        line = alt.Chart(inline([row])).encode(x="average:Q")
        layers.append(line.mark_rule(strokeDash=[5, 4], strokeWidth=1.5))
        layers.append(
            line.mark_text(align="left", dx=-3, fontSize=12, baseline="bottom").encode(
                text="method:N", y=alt.value(-6 - 14 * number)
            )
        )
    return alt.LayerChart(layer=layers, width=_WIDTH, height=max(110, 50 * len(rows)))


def _shade(row: Row, chosen: str | None) -> str:
    return CHOSEN if row["method"] == chosen else BASELINE


def pareto(rows: Sequence[Row], *, higher: bool) -> list[Row]:
    """The rows that no other one beats in learning and in forgetting at once, from most learning to least."""
    sign = 1 if higher else -1
    ordered = sorted(rows, key=lambda row: (-sign * row["learning"], row["forgetting"]))
    front: list[Row] = []
    for row in ordered:
        if not front or row["forgetting"] < front[-1]["forgetting"]:
            front.append(row)
    return front


def plane(
    rows: Sequence[Row], *, chosen: str | None, baseline: str | None, unit: str, higher: bool, labels: int = 14
) -> alt.LayerChart:
    """Stability against plasticity: right = learnt more, up = forgot less, the line = nobody is better in both.

    Args:
        rows: method, learning, forgetting, with optional `low` and `high` of both.
        chosen: The recommended method.
        baseline: The baseline.
        unit: Of the scores, with the scorer.
        higher: Whether higher is better.
        labels: Up to how many methods names are written; beyond, only those on the front.
    """
    front = pareto(rows, higher=higher)
    on_front = [row["method"] for row in front]
    tones = _tones([row["method"] for row in rows], chosen, baseline)
    marked = {chosen, baseline, *on_front} if len(rows) > labels else set(tones)
    data = [_point(row, bars=row["method"] in marked) for row in rows]
    data = [row | {"shade": tones[row["method"]], "front": row["method"] in on_front} for row in data]
    digits = number_format([row[k] for row in rows for k in ("learning", "forgetting")])
    x_title = f"score right after learning, {unit}   (learns more →)"
    x = alt.X("learning:Q", title=x_title, scale=alt.Scale(zero=False, reverse=not higher, padding=40))
    y = alt.Y(
        "forgetting:Q", title="forgetting   (forgets less ↑)", scale=alt.Scale(reverse=True, zero=False, padding=24)
    )
    base = alt.Chart(inline(data)).encode(x=x, y=y)
    shade = alt.Color("shade:N", scale=None)
    shape = alt.Shape(
        "front:N",
        scale=alt.Scale(domain=[True, False], range=["circle", "square"]),
        legend=alt.Legend(
            title=None, labelExpr="datum.value ? 'on the Pareto front' : 'beaten in both by another'", orient="bottom"
        ),
    )
    tooltip = [alt.Tooltip("method:N"), *(alt.Tooltip(f"{k}:Q", format=digits) for k in ("learning", "forgetting"))]
    line = alt.Chart(inline([_point(row, bars=False) | {"order": i} for i, row in enumerate(front)]))
    layers: list[Any] = [
        line.mark_line(strokeDash=[4, 4], strokeWidth=1.5, color=BASELINE).encode(x=x, y=y, order="order:Q"),
        *(base.mark_rule(opacity=0.7).encode(color=shade, **bar) for bar in _bars(rows)),
        base.mark_point(size=150, opacity=1, filled=True).encode(color=shade, shape=shape, tooltip=tooltip),
    ]
    named = [row for row in data if row["method"] in marked]
    text = alt.Chart(inline(named)).encode(x=x, y=y, text="method:N")
    layers.append(text.mark_text(align="left", dx=12, dy=-9, fontSize=13))
    return alt.LayerChart(layer=layers, width=_WIDTH, height=340)


def _point(row: Row, *, bars: bool) -> Row:
    """What the plane needs of a row; a cloud of points shows its intervals in the table only."""
    keys = ["learning", "forgetting"]
    keys += [f"{key} {end}" for key in keys for end in ("low", "high")] if bars else []
    return {"method": row["method"], **{key: row.get(key) for key in keys}}


def _bars(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Encodings of the interval bars that have a number."""
    sides = {"learning": ("x", "x2"), "forgetting": ("y", "y2")}
    return [{a: f"{m} low:Q", b: f"{m} high:Q"} for m, (a, b) in sides.items() if _any(rows, f"{m} low")]


def _tones(names: Sequence[str], chosen: str | None, baseline: str | None) -> dict[str, str]:
    scale, _ = color_of(names, chosen=chosen, baseline=baseline)
    return dict(zip(names, scale.to_dict()["range"], strict=True))


def forest(rows: Sequence[Row]) -> alt.FacetChart:
    """Paired differences to the baseline of each axis: right of 0 is better; colour and shape are the decision.

    Args:
        rows: axis, method, against, metric, `better by`, low, high, interval, evidence, `in words`.
    """
    several = len({row["axis"] for row in rows}) > 1
    titles = {"average": "score at the end", "learning": "right after learning", "forgetting": "forgetting"}
    data = [
        {
            **row,
            "panel": titles[row["metric"]],
            "side": _SIDES.get(row["evidence"], _NOT_SHOWN),
            "name": _label(row, several),
        }
        for row in rows
    ]
    names = list(dict.fromkeys(row["name"] for row in data))
    tones = {"shown to be better": CHOSEN, "shown to be worse": "#d55e00", _NOT_SHOWN: BASELINE}
    shown = [kind for kind in tones if any(row["side"] == kind for row in data)]
    scale = alt.Scale(domain=shown, range=[tones[kind] for kind in shown])
    color = alt.Color("side:N", scale=scale, legend=alt.Legend(title=None, orient="bottom"))
    y = alt.Y("name:N", sort=names, title=None, axis=alt.Axis(labelLimit=240))
    x = alt.X("better by:Q", title="better by →")
    base = alt.Chart().encode(y=y, color=color)
    words = ("method", "against", "interval", "evidence", "in words")
    tooltip = [alt.Tooltip(f"{k}:N") for k in words] + [alt.Tooltip(f"{k}:Q") for k in ("better by", "low", "high")]
    shape = alt.Shape("side:N", scale=alt.Scale(domain=shown, range=["circle", "square", "diamond"][: len(shown)]))
    layers = [alt.Chart().mark_rule(strokeDash=[3, 3], strokeWidth=1.5).encode(x=alt.datum(0))]
    # A layer without a single number would have an infinite scale.
    if _any(rows, "low"):
        layers.append(base.mark_rule(strokeWidth=3, opacity=0.7).encode(x="low:Q", x2="high:Q"))
    layers.append(base.mark_point(size=90, filled=True, opacity=1).encode(x=x, shape=shape, tooltip=tooltip))
    layer = alt.layer(*layers).properties(width=215, height=max(90, 30 * len(names)))
    facet = alt.Facet("panel:N", sort=list(titles.values()), header=alt.Header(title=None))
    chart: alt.FacetChart = layer.facet(facet, data=inline(data), columns=3)
    return chart


_NOT_SHOWN = "not shown"
_SIDES = {"better": "shown to be better", "worse": "shown to be worse"}


def _label(row: Row, several: bool) -> str:
    return f"{row['axis']}: {row['method']}" if several else str(row["method"])


def _any(rows: Sequence[Row], key: str) -> bool:
    return any(row.get(key) is not None for row in rows)
