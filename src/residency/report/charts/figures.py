"""Which charts a report shows, of what, and what it says instead where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import altair as alt

from residency.core.text import printable
from residency.report.advice.advice import Advice
from residency.report.charts import axes, costs, drift, overview, stream
from residency.report.charts.selection import ChartSelection
from residency.report.charts.theme import Figure
from residency.report.evidence.effects import TIMES
from residency.report.records.arms import Arm, mean_matrix
from residency.report.records.records import Records
from residency.report.records.settings import numeric_settings
from residency.report.tables.frames import Frames
from residency.runs.views.heatmap import comparison

__all__ = ["figures_of"]

Row = dict[str, Any]
# More than this in one picture is no picture; the tables have everything.
_LINES, _ROWS, _POINTS, _MATRICES, _DOMAINS, _NUMBERS = 8, 14, 600, 6, 12, 260


def figures_of(records: Records, arms: Sequence[Arm], frames: Frames, advice: Advice) -> list[Figure]:
    """All figures of a report in reading order."""
    selection = ChartSelection(records, arms, frames, advice)
    makers = (_kept, _plane, _forest, _stream, _domains, _heat, _grid, _sensitivity, _drift, _loss, _costs)
    return [figure for make in makers for figure in make(selection)]


def _figure(id: str, title: str, caption: str, chart: alt.TopLevelMixin | None, absent: str) -> Figure:
    return Figure(id=id, title=title, caption=caption, chart=chart, absent="" if chart is not None else absent)


def _kept(selection: ChartSelection) -> Iterator[Figure]:
    rows = [row for row in selection.best(_ROWS) if row.get("learning") is not None]
    caption = "○ right after each domain was learnt · ● after the last one. The line between is what was forgotten."
    chart = None
    if rows:
        # A base model that knows nothing of the domains would squeeze all methods into a corner: it is told instead.
        values = [row[k] for row in rows for k in ("learning", "average")]
        near = [r for r in selection.references if _near(r["average"], values)]
        caption += "".join(
            f" {r['method'].capitalize()}: {r['average']:.2f}." for r in selection.references if r not in near
        )
        chart = overview.learned_and_kept(
            rows, references=near, chosen=selection.chosen, unit=selection.unit, higher=selection.higher
        )
    absent = "No cell is complete."
    yield _figure("learned-and-kept", "Learnt, and kept", caption + selection.cut(_ROWS), chart, absent)


def _near(value: float, values: Sequence[float]) -> bool:
    low, high = min(values), max(values)
    reach = 0.4 * (high - low) or 1.0
    return low - reach <= value <= high + reach


def _plane(selection: ChartSelection) -> Iterator[Figure]:
    rows = [r for r in selection.ranked[:_POINTS] if r.get("learning") is not None and r.get("forgetting") is not None]
    caption = (
        "Top right is best: learnt much, forgot little. Who is off the dashed line is beaten in both by another. "
        "Bars are 95 % intervals."
    )
    chart = None
    if len(rows) > 1:
        chart = overview.plane(
            rows, unit=selection.unit, higher=selection.higher, chosen=selection.chosen, baseline=selection.baseline
        )
    absent = "Stability against plasticity needs two methods and two domains."
    yield _figure("plane", "Stability against plasticity", caption, chart, absent)


def _forest(selection: ChartSelection) -> Iterator[Figure]:
    rows = [r for r in selection.frames.comparisons.to_dicts() if r["scorer"] == selection.records.scorer]
    rows = [r for r in rows if r["metric"] != "general" and TIMES not in r["axis"]]
    values = list(dict.fromkeys((row["axis"], row["method"]) for row in rows))[:_ROWS]
    rows = [row for row in rows if (row["axis"], row["method"]) in values and row["better by"] is not None]
    caption = (
        "Every value of every axis against its baseline, paired over seeds and settings; right of 0 is better. "
        "Bars are 95 % intervals over seeds and test rows; the colour is the decision after correction for all "
        "comparisons of this page."
    )
    chart = overview.forest(rows) if rows else None
    absent = f"Nothing was run beside the baseline ({printable(selection.records.baseline)}) in the same setting."
    yield _figure("forest", "Differences to the baseline", caption + selection.cut(_ROWS), chart, absent)


def _stream(selection: ChartSelection) -> Iterator[Figure]:
    names = selection.names(_LINES)
    rows = [row for row in _scores(selection, names) if row["score"] is not None]
    columns = list(dict.fromkeys(row["column"] for row in rows))
    rows = [row for row in rows if row["column"] in columns[:_DOMAINS]]
    caption = (
        "One panel per domain; the dashed line marks the stage that taught it. After it, every rise is forgetting."
    )
    caption = caption.replace("rise", "fall") if selection.higher else caption
    chart = None
    if rows:
        chart = stream.over_the_stream(rows, unit=selection.short, higher=selection.higher, **selection.style)
    absent = "No scores after any stage."
    yield _figure("stream", "Scores over the stream", caption + selection.cut(_LINES), chart, absent)


def _scores(selection: ChartSelection, names: Sequence[str]) -> list[Row]:
    rows = [row for row in selection.frames.scores.to_dicts() if row["method"] in names] if names else []
    return sorted(rows, key=lambda row: (names.index(row["method"]), row["stage"]))


def _domains(selection: ChartSelection) -> Iterator[Figure]:
    names = selection.names(_ROWS)
    rows = [
        row
        for row in (selection.frames.domains.to_dicts() if names else [])
        if row["method"] in names and not row["probe"] and None not in (row["learned"], row["end"])
    ]
    shown = list(dict.fromkeys(row["domain"] for row in rows))[:_DOMAINS]
    rows = sorted((r for r in rows if r["domain"] in shown), key=lambda r: names.index(r["method"]))
    caption = "○ right after the domain was learnt · ● at the end of the stream."
    chart = stream.by_domain(rows, unit=selection.short, higher=selection.higher, **selection.style) if rows else None
    yield _figure("domains", "Domain by domain", caption + selection.cut(_ROWS), chart, "No domain has both scores.")


def _heat(selection: ChartSelection) -> Iterator[Figure]:
    count = _room(selection)
    names = selection.names(count)
    by_name = {arm.name: arm for arm in selection.arms}
    scorers = [selection.records.scorer]
    scorers += [s for s in _scorers(selection) if s not in scorers]
    for scorer in scorers:
        records = [_mean_record(by_name[name], scorer) for name in names]
        known = [record for record in records if record is not None]
        chart = comparison(known, scorer) if known else None
        caption = "Rows: after which stage; columns: scored on which domain. Dark is good; outlined: just learnt."
        seeds = " Means over seeds." if any(len(by_name[name].done) > 1 for name in names) else ""
        title = f"Score matrices: {printable(scorer)}"
        number = "" if scorer == scorers[0] else f"-{scorers.index(scorer)}"
        cut = selection.cut(count)
        yield _figure(f"matrices{number}", title, caption + seeds + cut, chart, "No matrix is known.")


def _room(selection: ChartSelection) -> int:
    """How many matrices fit into one picture; the page's viewer has all of them."""
    sizes = [
        len(e.record["domains"]) + len(e.record.get("probes") or []) for arm in selection.arms for e in arm.done[:1]
    ]
    return max(2, min(_MATRICES, _NUMBERS // (max(sizes, default=1) + 1) ** 2))


def _scorers(selection: ChartSelection) -> list[str]:
    names: dict[str, None] = {}
    for arm in selection.arms:
        for entry in arm.done:
            names |= dict.fromkeys(entry.record["scores"])
    return list(names)


def _mean_record(arm: Arm, scorer: str) -> Row | None:
    """The matrix of an arm averaged over its seeds; a cell that one seed lacks is missing."""
    own = [e.record for e in arm.entries if e.done and scorer in (e.record.get("scores") or {})]
    own = [r for r in own if r["domains"] == own[0]["domains"]]
    if not own:
        return None
    mean = mean_matrix([record["scores"][scorer]["R"] for record in own])
    scores = {scorer: {**own[0]["scores"][scorer], "R": mean}}
    return {**own[0], "cell": arm.name, "scores": scores, "status": "done"}


def _grid(selection: ChartSelection) -> Iterator[Figure]:
    names = list(dict.fromkeys(axis for arm in selection.arms for axis, _ in arm.place))
    counts = {n: len({dict(arm.place).get(n) for arm in selection.arms}) for n in names}
    wide = sorted((n for n in names if counts[n] > 1), key=lambda n: n != selection.records.subject)
    absent = "Only one axis was varied, so there is no grid."
    if len(wide) < 2:
        yield _figure("grid", "Ablation grid", "", None, absent)
        return
    first, second = wide[0], max(wide[1:], key=lambda n: counts[n])
    for metric, title in (("average", "score at the end"), ("forgetting", "forgetting")):
        cells: dict[tuple[str, str], list[float]] = {}
        for arm in selection.arms:
            place, value = dict(arm.place), arm.mean(metric)
            if value is not None:
                key = (place.get(first, "-"), place.get(second, "-"))
                cells.setdefault(key, []).append(value)
        rows = [{"row": r, "column": c, "value": fmean(v)} for (r, c), v in cells.items()]
        less = metric == "forgetting" or not selection.higher
        rest = f", mean over {', '.join(n for n in wide if n not in (first, second))}" if len(wide) > 2 else ""
        chart = None
        if rows and len({row["row"] for row in rows}) <= 40 and len({row["column"] for row in rows}) <= 30:
            options = {
                "first": first,
                "second": second,
                "metric": title,
                "unit": selection.unit,
                "less_is_better": less,
            }
            chart = axes.grid(rows, **options)  # type: ignore[arg-type]
        caption = f"{first} against {second}: {title}{rest}. Dark is good."
        absent = "The grid has no value, or too many to draw."
        yield _figure(f"grid-{metric}", f"Ablation grid: {title}", caption, chart, absent)


def _sensitivity(selection: ChartSelection) -> Iterator[Figure]:
    found = numeric_settings(selection.arms)
    by_name = {row["method"]: row for row in selection.ranked}
    for number, (setting, points) in enumerate(found.items()):
        rows = []
        for group, x, name in points:
            row = by_name.get(name)
            if row is not None:
                rows.append({**row, "group": group, "x": x})
        chart = None
        if len({row["x"] for row in rows}) > 1:
            chart = axes.sensitivity(rows, setting=setting, unit=selection.unit, higher=selection.higher)
        caption = f"What {printable(setting)} does, everything else equal. Bars are 95 % intervals."
        yield _figure(f"sensitivity-{number + 1}", f"Sensitivity to {printable(setting)}", caption, chart, "No scores.")
    if not found:
        absent = "No numeric setting was varied with three values or more."
        yield _figure("sensitivity", "Sensitivity", "", None, absent)


def _drift(selection: ChartSelection) -> Iterator[Figure]:
    names = selection.names(_LINES)
    rows = [row for arm in selection.arms if arm.name in names for row in drift.findings(arm)]
    rows.sort(key=lambda row: (names.index(row["method"]), row["stage"]))
    caption = "Since before training, after every stage, averaged over seeds." + selection.cut(_LINES)
    chart = drift.over_stages(rows, **selection.style) if rows else None
    absent = "Nobody looked inside the model in these runs; --inspection.weights and its like switch that on."
    yield _figure("drift", "What changed inside the model", caption, chart, absent)
    layers = [row for arm in selection.arms if arm.name in names for row in drift.blocks(arm)]
    layers.sort(key=lambda row: names.index(row["method"]))
    if layers:
        caption = "At the end of the stream, block by block from the input to the output."
        yield _figure("drift-blocks", "Where it changed", caption, drift.by_block(layers, **selection.style), "")


def _loss(selection: ChartSelection) -> Iterator[Figure]:
    rows: list[Row] = []
    for name in selection.names(_LINES):
        arm = next(arm for arm in selection.arms if arm.name == name)
        rows += _thinned(name, arm.done[0].history())
    caption = "The task's part of the training loss, one seed per method." + selection.cut(_LINES)
    chart = stream.training_loss(rows, **selection.style) if rows else None
    yield _figure("loss", "Training loss", caption, chart, "No history was logged.")


def _thinned(name: str, lines: Sequence[Row], points: int = 240) -> list[Row]:
    known = [line for line in lines if isinstance(line.get("loss/task", line.get("loss")), int | float)]
    step = max(1, len(known) // points)
    kept = known[::step]
    return [
        {
            "method": name,
            "stream_step": line["stream_step"],
            "stage": line["stage"],
            "loss": line.get("loss/task", line.get("loss")),
        }
        for line in kept
        if "stream_step" in line and "stage" in line
    ]


def _costs(selection: ChartSelection) -> Iterator[Figure]:
    names = selection.names(_ROWS)
    rows = [row for row in (selection.frames.costs.to_dicts() if names else []) if row["method"] in names]
    rows.sort(key=lambda row: names.index(row["method"]))
    chart = costs.costs(rows, **selection.style) if rows else None
    caption = (
        "Means over seeds. The time in its parts: before the first steps, the steps, after the last one, scoring. "
        "Extra state is what the mitigation keeps between stages."
    )
    yield _figure("costs", "What it costs", caption + selection.cut(_ROWS), chart, "No costs were recorded.")
