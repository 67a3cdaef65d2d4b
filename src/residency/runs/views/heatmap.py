"""Score matrices as heat maps: rows are stages, columns domains and probes, the darker the better.

Names are data and stay data: they enter the charts as values, never as expressions, HTML or file names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import altair as alt

from residency.core.errors import UserError
from residency.runs.views.chart_data import inline, shared
from residency.runs.views.tables import Record, finite, printable, score_at, scores

__all__ = ["comparison", "heat_map", "save"]

# One hue from light to dark survives grey printing and every colour vision; the outline is Okabe and Ito's vermillion.
WORST, BEST, OUTLINE, MISSING = "#f3f7fb", "#08306b", "#D55E00", "#e3e3e3"
RAMP = [WORST, "#c9ddf0", "#8fc1de", "#4a98c9", "#1d6cb1", BEST]
FONT = "DejaVu Sans, Verdana, Arial, sans-serif"
CELL_WIDTH, CELL_HEIGHT = 76, 36


def heat_map(record: Record, scorer: str) -> alt.ConcatChart:
    """The score matrix of one run with its numbers; outlined: right after the domain was learned.

    Raises:
        UserError: The record does not have this scorer.
    """
    entry = scores(record, scorer)
    panels = _panels(record, entry, _Shade.over([entry]), scorer)
    heading = f"{_heading(record)}: {printable(scorer)} after every stage"
    title = alt.Title(heading, subtitle=_subtitle(entry, scorer, []))
    return _dressed(alt.concat(panels, title=title))


def comparison(records: Iterable[Record], scorer: str) -> alt.ConcatChart:
    """One heat map per run on one colour scale; runs without the scorer are named below the title.

    Raises:
        UserError: No record has this scorer.
    """
    records = list(records)
    shown = [r for r in records if scorer in (r.get("scores") or {})]
    if not shown:
        raise UserError(
            f"none of {len(records)} cells has the scorer {printable(scorer)!r}",
            why="a comparison needs at least one score matrix",
            fix="name a scorer of these cells, or run them first",
        )
    shade = _Shade.over([scores(r, scorer) for r in shown])
    panels = []
    for record in shown:
        title = alt.Title(_heading(record), fontSize=15)
        panels.append(_panels(record, scores(record, scorer), shade, scorer).properties(title=title))
    left_out = [_heading(r) for r in records if scorer not in (r.get("scores") or {})]
    subtitle = _subtitle(scores(shown[0], scorer), scorer, left_out)
    widest = max(len(r["domains"]) + len(r.get("probes") or []) for r in shown)
    columns = max(1, min(3, 12 // widest, len(shown)))
    columns = math.ceil(len(shown) / math.ceil(len(shown) / columns))  # 2 and 2 rather than 3 and 1
    title = alt.Title(f"{printable(scorer)} after every stage", subtitle=subtitle)
    return _dressed(alt.concat(*panels, columns=columns, title=title, spacing=36))


def save(chart: alt.TopLevelMixin, path_stem: str | Path) -> list[Path]:
    """Write `<path_stem>.png` (twice the size) and `<path_stem>.svg`, each whole or not at all, without a network.

    Args:
        chart: Any chart of this module.
        path_stem: Folder and file name without an ending. Choose the name yourself, do not take it from data.

    Returns:
        The two paths, PNG first.
    """
    import vl_convert

    # Charts are looked at without torch, which comes with the storage module.
    from residency.core.tensor_files import replace_file

    # The grammar altair wrote for; and no address is allowed: what a chart shows is in the chart.
    spec, grammar = chart.to_dict(), alt.SCHEMA_VERSION.rpartition(".")[0]
    png = vl_convert.vegalite_to_png(spec, vl_version=grammar, scale=2, allowed_base_urls=[])
    svg = vl_convert.vegalite_to_svg(spec, vl_version=grammar, allowed_base_urls=[]).encode()
    stem, paths = Path(path_stem), []
    for ending, content in (("png", png), ("svg", svg)):
        # Not with_suffix: "stream.v2" would lose its end.
        path = stem.with_name(f"{stem.name}.{ending}")
        replace_file(path, partial(_write, content))
        paths.append(path)
    return paths


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


@dataclass(frozen=True, kw_only=True)
class _Shade:
    """One colour scale: from `worst` to `best`, logarithmic if losses span a large ratio."""

    worst: float
    best: float
    log: bool

    @classmethod
    def over(cls, entries: Sequence[Mapping[str, Any]]) -> _Shade:
        """The scale that holds every score of these entries."""
        values = [v for entry in entries for row in entry["R"] for v in map(finite, row) if v is not None] or [0.0, 1.0]
        low, high = min(values), max(values)
        high = high if high > low else low + 1.0
        # One domain the base model knows nothing about must not flatten the differences between all others.
        if entries[0]["higher_is_better"]:
            return cls(worst=low, best=high, log=False)
        return cls(worst=high, best=low, log=low > 0 and high / low > 4)

    def ink(self, value: float) -> str:
        """Black or white, whichever is readable on the shade of this value."""
        worst, best, at = (math.log(v) if self.log else v for v in (self.worst, self.best, value))
        return "white" if (at - worst) / (best - worst) > 0.7 else "#1a1a1a"

    def color(self, title: str) -> alt.Color:
        low, high = sorted((self.worst, self.best))
        ramp = RAMP if self.best > self.worst else RAMP[::-1]
        scale = alt.Scale(type="log" if self.log else "linear", domain=[low, high], range=ramp, nice=False)
        legend = alt.Legend(title=title, gradientLength=140, gradientThickness=14, tickCount=5, format=".3~g")
        return shared(alt.Color("value:Q", scale=scale, legend=legend))


def _panels(record: Record, entry: Mapping[str, Any], shade: _Shade, scorer: str) -> alt.HConcatChart:
    """Domains, then probes beside them."""
    domains, probes = list(record["domains"]), list(record.get("probes") or [])
    rows = _labels(["base", *(f"after {printable(name, 28)}" for name in domains)])
    names = _labels([printable(name, 18) for name in (*domains, *probes)])
    digits = 3 if all(abs(v) <= 1 for v in (shade.worst, shade.best)) else 2
    cells = []
    for row, after in enumerate(rows):
        for column, name in enumerate(names):
            value = score_at(entry["R"], row, column)
            ink = "#555555" if value is None else shade.ink(value)
            text = "-" if value is None else f"{value:.{digits}f}"
            cell = {"after": after, "name": name, "value": value, "text": text, "ink": ink}
            cells.append(cell | {"learned": row == column + 1 and column < len(domains)})
    color = shade.color(printable(scorer) + (", log scale" if shade.log else ""))
    parts = [_panel(cells, rows, names[: len(domains)], color, labelled=True)]
    if probes:
        parts.append(_panel(cells, rows, names[len(domains) :], color, labelled=False))
    return alt.hconcat(*parts, spacing=14)


def _panel(
    cells: Sequence[Mapping[str, Any]], rows: Sequence[str], names: Sequence[str], color: alt.Color, *, labelled: bool
) -> alt.LayerChart:
    own = [cell for cell in cells if cell["name"] in names]
    header = alt.Axis(orient="top", title="domains" if labelled else "probes", labelAngle=0)
    x = shared(alt.X("name:O", sort=None, scale=alt.Scale(domain=list(names)), axis=header))
    side = alt.Axis(title=None, labels=labelled)
    y = shared(alt.Y("after:O", sort=None, scale=alt.Scale(domain=list(rows)), axis=side))

    def marks(values: Iterable[Mapping[str, Any]]) -> alt.Chart:
        return alt.Chart(inline([*values])).encode(x=x, y=y)

    known = [cell for cell in own if cell["value"] is not None]
    gaps = [cell for cell in own if cell["value"] is None]
    layers = [
        marks(known).mark_rect(stroke="white", strokeWidth=1.5).encode(color=color),
        marks(gaps).mark_rect(stroke="white", strokeWidth=1.5, fill=MISSING),
        marks(c for c in own if c["learned"]).mark_rect(filled=False, stroke=OUTLINE, strokeWidth=3),
    ]
    for ink in sorted({cell["ink"] for cell in own}):
        numbers = marks(cell for cell in own if cell["ink"] == ink)
        layers.append(numbers.mark_text(fontSize=14, color=ink).encode(text="text:N"))
    width = max(CELL_WIDTH, 9 * max(len(name) for name in names))
    return alt.LayerChart(layer=layers, width=width * len(names), height=CELL_HEIGHT * len(rows))


def _heading(record: Record) -> str:
    """The cell, and what keeps it from being compared with others as it is."""
    status = printable(record.get("status") or "missing")
    told = ["told the domain at test time"] if record.get("task_id_at_test") else []
    remarks = [*([status] if status != "done" else []), *told]
    return printable(record.get("cell", "run")) + (f" ({', '.join(remarks)})" if remarks else "")


def _labels(names: Sequence[str]) -> list[str]:
    """The names, told apart: two columns of one name must not fall onto each other."""
    labels: list[str] = []
    for name in names:
        candidates = (name if number == 1 else f"{name} ({number})" for number in count(1))
        labels.append(next(label for label in candidates if label not in labels))
    return labels


def _subtitle(entry: Mapping[str, Any], scorer: str, left_out: Sequence[str]) -> list[str]:
    better = "higher" if entry["higher_is_better"] else "lower"
    lines = [
        f"{printable(scorer)} in {printable(entry.get('unit') or 'unknown unit')}: {better} is better, dark is good",
        "outlined: right after the domain was learned; - missing",
    ]
    return [*lines, *([f"not shown: {', '.join(left_out)}"] if left_out else [])]


def _dressed(chart: alt.ConcatChart) -> alt.ConcatChart:
    # In one call: each copies the chart with all its data.
    dressed: alt.ConcatChart = chart.configure(
        font=FONT,
        background="white",
        padding=16,
        view=alt.ViewConfig(stroke=None),
        axis=alt.AxisConfig(
            domain=False,
            ticks=False,
            grid=False,
            labelFontSize=13,
            titleFontSize=13,
            titleFontWeight="normal",
            titleColor="#555555",
            labelColor="#1a1a1a",
            labelLimit=220,
            labelPadding=6,
            titlePadding=8,
        ),
        title=alt.TitleConfig(
            anchor="start", fontSize=18, subtitleFontSize=13, subtitleColor="#444444", subtitlePadding=6, offset=14
        ),
        legend=alt.LegendConfig(labelFontSize=12, titleFontSize=13, titleFontWeight="normal", titleLimit=200),
    )
    return dressed
