"""The tables of the first screen, and of benchmarks behind it, as they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from residency.report.tables.first_screen import LINES
from residency.report.tables.html_tables import Cell, Column, Grid, Row, number_cell, word
from residency.runs.views.tables import finite, printable

__all__ = ["benchmarks_grid", "first_grid"]


def first_grid(rows: Sequence[Mapping[str, Any]], *, leader: str, baseline: str) -> Grid:
    """The first screen: every score of whom the page is about against the baseline."""
    lines = {key: said for key, said in LINES.items() if any(row[key] is not None for row in rows)}
    held = [Column(key, True, f"{said}, averaged over the same domains") for key, said in lines.items()]
    sides = [Column("before training", True), *held, Column(baseline, True)]
    sides += [Column(leader, True)] * (leader != baseline)
    compared = [Column("better by", True, "+ is better; 95 % interval"), Column("evidence")] * (leader != baseline)
    made = []
    for row in rows:
        keys = ("baseline", "leader") if leader != baseline else ("baseline",)
        cells = [Cell(row["score"], None, row["domains"]), *(number_cell(row[key], 3) for key in ("before", *lines))]
        cells += [_with_error(row, key) for key in keys]
        if compared:
            low, high = finite(row["low"]), finite(row["high"])
            ends = "" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"
            better = number_cell(row["better by"], 3, sign=True)
            cells += [Cell(better.text, better.key, ends), Cell(word(row["evidence"]))]
        made.append(Row(cells, {"better": "shown-better", "worse": "shown-worse"}.get(str(row["evidence"]), "")))
    columns = [Column("score at the end"), *sides, *compared]
    return Grid(
        id="first", title="Every score at the end, averaged over the domains that have it", columns=columns, rows=made
    )


def _with_error(row: Mapping[str, Any], side: str) -> Cell:
    """A number with its standard error, where it has one."""
    cell, error = number_cell(row[side], 3), finite(row[f"{side} error"])
    return cell if error is None else Cell(f"{cell.text} ± {error:.3f}", cell.key, "standard error")


def benchmarks_grid(rows: Sequence[Mapping[str, Any]]) -> Grid:
    """What lm-eval found since before training, benchmark by benchmark."""
    columns = [Column("method"), Column("benchmark"), Column("change", True, "+ is better"), Column("seeds", True)]
    columns[3:3] = [Column("standard error", True, "of the change, over the benchmark's rows; seeds share these rows")]
    made = []
    for row in rows:
        names = [Cell(printable(row["method"])), Cell(row["benchmark"], None, printable(row["metric"]))]
        numbers = [number_cell(row["change"], 3, sign=True), number_cell(row["standard error"], 3)]
        made.append(Row([*names, *numbers, Cell(str(row["seeds"]), row["seeds"])]))
    return Grid(id="benchmarks", title="Benchmarks since before training", columns=columns, rows=made)
