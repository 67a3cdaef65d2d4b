"""Which charts a report shows, of what, and what it says instead where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import altair as alt

from residency.core.text import printable
from residency.report.advice.advice import Advice
from residency.report.charts import axes, costs, drift, overview, stream
from residency.report.charts.selection import Board
from residency.report.charts.theme import Figure
from residency.report.records.arms import Arm, mean_matrix
from residency.report.records.records import Material
from residency.report.records.settings import numeric_settings
from residency.report.tables.frames import Frames
from residency.runs.views.heatmap import comparison

__all__ = ["figures_of"]

Row = dict[str, Any]
# More than this in one picture is no picture; the tables have everything.
_LINES, _ROWS, _POINTS, _MATRICES, _DOMAINS, _NUMBERS = 8, 14, 600, 6, 12, 260


def figures_of(material: Material, arms: Sequence[Arm], frames: Frames, advice: Advice) -> list[Figure]:
    """All figures of a report in reading order."""
    board = Board(material, arms, frames, advice)
    makers = (_kept, _plane, _forest, _stream, _domains, _heat, _grid, _sensitivity, _drift, _loss, _costs)
    return [figure for make in makers for figure in make(board)]


def _figure(id: str, title: str, caption: str, chart: alt.TopLevelMixin | None, absent: str) -> Figure:
    return Figure(id=id, title=title, caption=caption, chart=chart, absent="" if chart is not None else absent)


def _kept(board: Board) -> Iterator[Figure]:
    rows = [row for row in board.best(_ROWS) if row.get("learning") is not None]
    caption = "○ right after each domain was learnt · ● after the last one. The line between is what was forgotten."
    chart = None
    if rows:
        # A base model that knows nothing of the domains would squeeze all methods into a corner: it is told instead.
        values = [row[k] for row in rows for k in ("learning", "average")]
        near = [r for r in board.references if _near(r["average"], values)]
        caption += "".join(
            f" {r['method'].capitalize()}: {r['average']:.2f}." for r in board.references if r not in near
        )
        chart = overview.learned_and_kept(
            rows, references=near, chosen=board.chosen, unit=board.unit, higher=board.higher
        )
    absent = "No cell is complete."
    yield _figure("learned-and-kept", "Learnt, and kept", caption + board.cut(_ROWS), chart, absent)


def _near(value: float, values: Sequence[float]) -> bool:
    low, high = min(values), max(values)
    reach = 0.4 * (high - low) or 1.0
    return low - reach <= value <= high + reach


def _plane(board: Board) -> Iterator[Figure]:
    rows = [r for r in board.ranked[:_POINTS] if r.get("learning") is not None and r.get("forgetting") is not None]
    caption = (
        "Top right is best: learnt much, forgot little. Who is off the dashed line is beaten in both by another. "
        "Bars are 95 % intervals."
    )
    chart = None
    if len(rows) > 1:
        chart = overview.plane(rows, unit=board.unit, higher=board.higher, chosen=board.chosen, baseline=board.baseline)
    absent = "Stability against plasticity needs two methods and two domains."
    yield _figure("plane", "Stability against plasticity", caption, chart, absent)


def _forest(board: Board) -> Iterator[Figure]:
    names = board.names(_ROWS)
    rows = [r for r in board.frames.comparisons.to_dicts() if r["method"] in names]
    rows.sort(key=lambda row: names.index(row["method"]))
    caption = (
        "Each method against the baseline on the same seeds and rows; right of 0 is better. Thick: 95 % bootstrap of "
        "seeds, then test rows. Thin: 95 % t-interval over seeds."
    )
    chart = overview.forest(rows, against=rows[0]["against"]) if rows else None
    absent = f"Nothing was run beside the baseline ({printable(board.material.baseline)}) in the same setting."
    yield _figure("forest", "Differences to the baseline", caption + board.cut(_ROWS), chart, absent)


def _stream(board: Board) -> Iterator[Figure]:
    names = board.names(_LINES)
    rows = [row for row in _scores(board, names) if row["score"] is not None]
    columns = list(dict.fromkeys(row["column"] for row in rows))
    rows = [row for row in rows if row["column"] in columns[:_DOMAINS]]
    caption = (
        "One panel per domain; the dashed line marks the stage that taught it. After it, every rise is forgetting."
    )
    caption = caption.replace("rise", "fall") if board.higher else caption
    chart = None
    if rows:
        chart = stream.over_the_stream(rows, unit=board.short, higher=board.higher, **board.style)
    absent = "No scores after any stage."
    yield _figure("stream", "Scores over the stream", caption + board.cut(_LINES), chart, absent)


def _scores(board: Board, names: Sequence[str]) -> list[Row]:
    rows = [row for row in board.frames.scores.to_dicts() if row["method"] in names] if names else []
    return sorted(rows, key=lambda row: (names.index(row["method"]), row["stage"]))


def _domains(board: Board) -> Iterator[Figure]:
    names = board.names(_ROWS)
    rows = [
        row
        for row in (board.frames.domains.to_dicts() if names else [])
        if row["method"] in names and not row["probe"] and None not in (row["learned"], row["end"])
    ]
    shown = list(dict.fromkeys(row["domain"] for row in rows))[:_DOMAINS]
    rows = sorted((r for r in rows if r["domain"] in shown), key=lambda r: names.index(r["method"]))
    caption = "○ right after the domain was learnt · ● at the end of the stream."
    chart = stream.by_domain(rows, unit=board.short, higher=board.higher, **board.style) if rows else None
    yield _figure("domains", "Domain by domain", caption + board.cut(_ROWS), chart, "No domain has both scores.")


def _heat(board: Board) -> Iterator[Figure]:
    count = _room(board)
    names = board.names(count)
    by_name = {arm.name: arm for arm in board.arms}
    scorers = [board.material.scorer]
    scorers += [s for s in _scorers(board) if s not in scorers]
    for scorer in scorers:
        records = [_mean_record(by_name[name], scorer) for name in names]
        known = [record for record in records if record is not None]
        chart = comparison(known, scorer) if known else None
        caption = "Rows: after which stage; columns: scored on which domain. Dark is good; outlined: just learnt."
        seeds = " Means over seeds." if any(len(by_name[name].done) > 1 for name in names) else ""
        title = f"Score matrices: {printable(scorer)}"
        number = "" if scorer == scorers[0] else f"-{scorers.index(scorer)}"
        cut = board.cut(count)
        yield _figure(f"matrices{number}", title, caption + seeds + cut, chart, "No matrix is known.")


def _room(board: Board) -> int:
    """How many matrices fit into one picture; the page's viewer has all of them."""
    sizes = [len(e.record["domains"]) + len(e.record.get("probes") or []) for arm in board.arms for e in arm.done[:1]]
    return max(2, min(_MATRICES, _NUMBERS // (max(sizes, default=1) + 1) ** 2))


def _scorers(board: Board) -> list[str]:
    names: dict[str, None] = {}
    for arm in board.arms:
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


def _grid(board: Board) -> Iterator[Figure]:
    names = list(dict.fromkeys(axis for arm in board.arms for axis, _ in arm.place))
    counts = {n: len({dict(arm.place).get(n) for arm in board.arms}) for n in names}
    wide = sorted((n for n in names if counts[n] > 1), key=lambda n: n != board.material.subject)
    absent = "Only one axis was varied, so there is no grid."
    if len(wide) < 2:
        yield _figure("grid", "Ablation grid", "", None, absent)
        return
    first, second = wide[0], max(wide[1:], key=lambda n: counts[n])
    for metric, title in (("average", "score at the end"), ("forgetting", "forgetting")):
        cells: dict[tuple[str, str], list[float]] = {}
        for arm in board.arms:
            place, value = dict(arm.place), arm.mean(metric)
            if value is not None:
                key = (place.get(first, "-"), place.get(second, "-"))
                cells.setdefault(key, []).append(value)
        rows = [{"row": r, "column": c, "value": fmean(v)} for (r, c), v in cells.items()]
        less = metric == "forgetting" or not board.higher
        rest = f", mean over {', '.join(n for n in wide if n not in (first, second))}" if len(wide) > 2 else ""
        chart = None
        if rows and len({row["row"] for row in rows}) <= 40 and len({row["column"] for row in rows}) <= 30:
            options = {"first": first, "second": second, "metric": title, "unit": board.unit, "less_is_better": less}
            chart = axes.grid(rows, **options)  # type: ignore[arg-type]
        caption = f"{first} against {second}: {title}{rest}. Dark is good."
        absent = "The grid has no value, or too many to draw."
        yield _figure(f"grid-{metric}", f"Ablation grid: {title}", caption, chart, absent)


def _sensitivity(board: Board) -> Iterator[Figure]:
    found = numeric_settings(board.arms)
    by_name = {row["method"]: row for row in board.ranked}
    for number, (setting, points) in enumerate(found.items()):
        rows = []
        for group, x, name in points:
            row = by_name.get(name)
            if row is not None:
                rows.append({**row, "group": group, "x": x})
        chart = None
        if len({row["x"] for row in rows}) > 1:
            chart = axes.sensitivity(rows, setting=setting, unit=board.unit, higher=board.higher)
        caption = f"What {printable(setting)} does, everything else equal. Bars are 95 % intervals."
        yield _figure(f"sensitivity-{number + 1}", f"Sensitivity to {printable(setting)}", caption, chart, "No scores.")
    if not found:
        absent = "No numeric setting was varied with three values or more."
        yield _figure("sensitivity", "Sensitivity", "", None, absent)


def _drift(board: Board) -> Iterator[Figure]:
    names = board.names(_LINES)
    rows = [row for arm in board.arms if arm.name in names for row in drift.findings(arm)]
    rows.sort(key=lambda row: (names.index(row["method"]), row["stage"]))
    caption = "Since before training, after every stage, averaged over seeds." + board.cut(_LINES)
    chart = drift.over_stages(rows, **board.style) if rows else None
    absent = "Nobody looked inside the model in these runs; --inspection.weights and its like switch that on."
    yield _figure("drift", "What changed inside the model", caption, chart, absent)
    layers = [row for arm in board.arms if arm.name in names for row in drift.blocks(arm)]
    layers.sort(key=lambda row: names.index(row["method"]))
    if layers:
        caption = "At the end of the stream, block by block from the input to the output."
        yield _figure("drift-blocks", "Where it changed", caption, drift.by_block(layers, **board.style), "")


def _loss(board: Board) -> Iterator[Figure]:
    rows: list[Row] = []
    for name in board.names(_LINES):
        arm = next(arm for arm in board.arms if arm.name == name)
        rows += _thinned(name, arm.done[0].history())
    caption = "The task's part of the training loss, one seed per method." + board.cut(_LINES)
    chart = stream.training_loss(rows, **board.style) if rows else None
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


def _costs(board: Board) -> Iterator[Figure]:
    names = board.names(_ROWS)
    rows = [row for row in (board.frames.costs.to_dicts() if names else []) if row["method"] in names]
    rows.sort(key=lambda row: names.index(row["method"]))
    chart = costs.costs(rows, **board.style) if rows else None
    caption = "Means over seeds. Extra state is what the mitigation keeps between stages."
    yield _figure("costs", "What it costs", caption + board.cut(_ROWS), chart, "No costs were recorded.")
