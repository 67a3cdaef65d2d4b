"""Frames as tables to be read: columns with headings, cells with a number to sort by and a text to show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from residency.metrics.discovery import matrix_metrics
from residency.report.advice.reasons import size
from residency.runs.views.tables import finite, printable

__all__ = [
    "Cell",
    "Column",
    "Grid",
    "Row",
    "comparisons_grid",
    "domains_grid",
    "flips_grid",
    "methods_grid",
    "number_cell",
    "plain_grid",
    "word",
]

# Rows that are in the page as they are; the rest is data that the page shows a part of at a time.
SHOWN = 100
# Columns that every page shows, and those that only the files do.
_FIXED = ["average", "learning", "forgetting", "bwt", "anytime_average", "min_accuracy", "worst_case_accuracy"]
_FIXED += ["relative_forgetting", "stability"]


@dataclass(frozen=True, slots=True)
class Column:
    """A heading; `help` is shown when it is pointed at."""

    label: str
    number: bool = False
    help: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """A text, a number to sort by, and a second line."""

    text: str
    key: float | None = None
    more: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """Cells; `kind` is `chosen`, `baseline`, `reference` or empty."""

    cells: Sequence[Cell]
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of the page."""

    id: str
    title: str
    columns: Sequence[Column] = ()
    rows: Sequence[Row] = ()
    shown: int = field(default=SHOWN)

    def data(self) -> list[dict[str, Any]]:
        """All rows, for the page's script."""
        return [{"kind": row.kind, "cells": [[c.text, c.key, c.more] for c in row.cells]} for row in self.rows]


def number_cell(value: Any, digits: int = 2, *, sign: bool = False) -> Cell:
    """A number, or a dash."""
    number = finite(value)
    if number is None:
        return Cell("-")
    return Cell(f"{number:{'+' if sign else ''}.{digits}f}", round(number, 9))


def _ranged(row: Mapping[str, Any], key: str, digits: int) -> Cell:
    cell, low, high = number_cell(row.get(key), digits), finite(row.get(f"{key} low")), finite(row.get(f"{key} high"))
    if low is None or high is None:
        return cell
    return Cell(cell.text, cell.key, f"[{low:.{digits}f}, {high:.{digits}f}]")


def methods_grid(rows: Sequence[Mapping[str, Any]], *, chosen: str | None, less: bool, unit: str) -> Grid:
    """The main table: references on top, then the best first."""
    digits = 3 if all(abs(v) <= 1 for row in rows for v in [finite(row.get("average"))] if v is not None) else 2
    sign = 1 if less else -1

    def rank(row: Mapping[str, Any]) -> tuple[bool, float]:
        value = finite(row.get("average"))
        return row["role"] != "reference", sign * value if value is not None else float("inf")

    ordered = sorted(rows, key=rank)
    axes = [key for key in (rows[0] if rows else {}) if key.startswith("axis: ")]
    optional = {
        **{
            name: Column(m.about.title, True, m.about.help)
            for name, m in matrix_metrics().items()
            if name not in _FIXED
        },
        "probes mean change": Column("general", True, "change of the probes since the base model, mean; + is better"),
        "probes worst change": Column("worst probe", True, "change of the probe that lost most; a mean hides it"),
        "better by": Column("better by", True, "score at the end against the baseline on the same seeds; + is better"),
        "evidence": Column("evidence", False, "the decision about this value, corrected for all comparisons"),
        "seconds": Column("seconds", True, "training and scoring"),
        "state bytes": Column("extra state", True, "what the mitigation keeps between stages"),
        "note": Column("note"),
    }
    extra = [key for key in optional if any(row.get(key) not in (None, "") for row in rows)]
    columns = [
        Column("method"),
        *(Column(printable(key.removeprefix("axis: "))) for key in axes),
        Column("seeds", True),
        Column("at the end", True, f"ACC: average over all domains after the last stage ({unit}), 95 % interval"),
        Column("just learnt", True, "learning accuracy: each domain right after its own stage, averaged"),
        Column("forgetting", True, "best score since learnt minus score at the end, averaged; above 0 is bad"),
        Column("BWT", True, "score at the end minus score when just learnt; below 0 is bad"),
        *(optional[key] for key in extra),
    ]
    made = [
        Row([*_first(row, axes, digits), *(_extra(row, k, digits) for k in extra)], _kind(row, chosen))
        for row in ordered
    ]
    return Grid(id="methods", title="All methods", columns=columns, rows=made)


def _first(row: Mapping[str, Any], axes: Sequence[str], digits: int) -> list[Cell]:
    told = "told the domain" if row.get("told the domain") else "baseline" if row.get("baseline") else ""
    seeds = finite(row.get("seeds"))
    return [
        Cell(printable(row["method"]), None, told),
        *(Cell(printable(row.get(axis) or "-")) for axis in axes),
        Cell("-") if seeds is None else Cell(f"{seeds:.0f}", seeds),
        *(_ranged(row, key, digits) for key in ("average", "learning", "forgetting")),
        number_cell(row.get("bwt"), digits),
    ]


def _kind(row: Mapping[str, Any], chosen: str | None) -> str:
    if row["role"] == "reference":
        return "reference"
    return "chosen" if row["method"] == chosen else "baseline" if row.get("baseline") else ""


def _extra(row: Mapping[str, Any], key: str, digits: int) -> Cell:
    value = row.get(key)
    if key == "evidence":
        return Cell(word(value))
    if key == "note":
        return Cell(printable(value or "", 200))
    number = finite(value)
    if number is None:
        return Cell("-")
    if key == "state bytes":
        return Cell(size(number), number)
    if key == "seconds":
        return Cell(f"{number:,.0f}", number)
    if key == "p":
        return Cell(f"{number:.3g}", number)
    return number_cell(number, digits, sign=key in ("better by", "probes mean change", "probes worst change"))


_WORDS = {"open": "not shown", "missing": "-"}


def word(value: Any) -> str:
    """The word of an evidence as tables print it."""
    return _WORDS.get(str(value), "-" if value is None else printable(value))


def comparisons_grid(rows: Sequence[Mapping[str, Any]]) -> Grid:
    """Every claim of the page with what was decided about it."""
    columns = [
        Column("axis"),
        Column("value"),
        Column("against"),
        Column("metric"),
        Column("seeds", True),
        Column("better by", True, "paired, over all settings of the other axes; + is better"),
        Column("95 % interval", True, "seeds and test rows are both a sample"),
        Column("noise floor", True, "what the choice of test rows alone can move the paired difference by"),
        Column("p (Holm)", True, "t-test, corrected for all comparisons of the page"),
        Column("smallest p", True, "what an exact sign-flip test on this many seeds can reach at best"),
        Column("evidence"),
        Column("in words"),
    ]
    made = []
    for row in rows:
        names = [Cell(printable(row[key])) for key in ("axis", "method", "against")]
        names.append(Cell(f"{row['metric']}, {printable(row['scorer'])}", None, printable(row["domains"])))
        numbers = [Cell(str(row["seeds"]), row["seeds"]), number_cell(row["better by"], 3, sign=True), _range(row)]
        numbers += [number_cell(row[key], 3) for key in ("noise floor", "p Holm", "smallest p exact")]
        made.append(Row([*names, *numbers, Cell(word(row["evidence"])), Cell(printable(row["in words"], 500))]))
    return Grid(id="comparisons", title="Everything that was compared", columns=columns, rows=made)


def _range(row: Mapping[str, Any]) -> Cell:
    low, high = finite(row["low"]), finite(row["high"])
    if low is None or high is None:
        return Cell("-")
    return Cell(f"{low:.3f} to {high:.3f}", low, printable(row["interval"]))


def flips_grid(rows: Sequence[Mapping[str, Any]]) -> Grid:
    """Answers that changed sides."""
    columns = [
        Column("method"),
        Column("compared with"),
        Column("score"),
        Column("right to wrong", True, "share of rows that were right and are wrong at the end; 95 % interval"),
        Column("wrong to right", True, "share of rows that were wrong and are right at the end; 95 % interval"),
        Column("McNemar p by seed", False, "exact; speaks of two trained models, not of two methods"),
    ]
    made = []
    for row in rows:
        cells = [Cell(printable(row["method"])), Cell(row["from"]), Cell(row["score"], None, row["domains"])]
        for rate in ("right to wrong", "wrong to right"):
            low, high = finite(row[f"{rate}, low"]), finite(row[f"{rate}, high"])
            ends = "" if low is None or high is None else f"[{low:.1%}, {high:.1%}]"
            cells.append(Cell(f"{row[rate]:.1%}", row[rate], ends))
        made.append(Row([*cells, Cell(row["McNemar p by seed"])]))
    return Grid(id="flips", title="Answers that changed sides", columns=columns, rows=made)


def domains_grid(rows: Sequence[Mapping[str, Any]]) -> Grid:
    """What became of every domain and probe."""
    columns = [Column("method"), Column("domain"), *(Column(k, True) for k in ("before", "just learnt", "at the end"))]
    columns.append(Column("forgotten", True, "above 0 is bad; of a probe: since the base model"))
    keys = ["before", "learned", "end", "forgotten"]
    if any(row.get("majority") is not None for row in rows):
        keys.append("majority")
        columns.append(Column("majority", True, "what the most frequent label of the training rows would score"))
    made = []
    for row in rows:
        name = Cell(printable(row["domain"]), None, "probe" if row["probe"] else "")
        numbers = [number_cell(row.get(key), 3) for key in keys]
        made.append(Row([Cell(printable(row["method"])), name, *numbers]))
    return Grid(id="domains", title="Domain by domain", columns=columns, rows=made)


def plain_grid(
    id: str, title: str, rows: Iterable[Mapping[str, Any]], *, show: Callable[[Any], str] | None = None
) -> Grid:
    """Any rows with the same keys, as text."""
    rows = list(rows)
    keys = list(rows[0]) if rows else []
    columns = [Column(key, all(isinstance(row.get(key), int | float | None) for row in rows)) for key in keys]
    made = [Row([_plain(row.get(key), show) for key in keys]) for row in rows]
    return Grid(id=id, title=title, columns=columns, rows=made)


def _plain(value: Any, show: Callable[[Any], str] | None) -> Cell:
    text = "-" if value is None else show(value) if show else printable(value, 300)
    return Cell(text, finite(value))
