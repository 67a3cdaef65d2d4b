"""Published numbers beside the user's own, with source and provenance; never a pass mark."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from residency.core.text import printable
from residency.metrics.published import PROVENANCE, load
from residency.report.tables.html_tables import Cell, Column, Grid, Row

__all__ = ["Published", "published"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """One set of published numbers, ready to be printed."""

    title: str
    warnings: tuple[str, ...]
    grid: Grid


def published(names: Iterable[str]) -> list[Published]:
    """The named sets.

    Raises:
        UserError: There is no such set; the message lists those there are.
    """
    return [_one(name, number) for number, name in enumerate(names)]


def _one(name: str, number: int) -> Published:
    found = load(name)
    columns = [Column("method"), Column("model"), Column("order"), Column("metric"), Column("value", True)]
    columns += [Column("seeds", True), Column("protocol"), Column("source"), Column("known how")]
    rows = []
    for row in found.rows:
        unit = f" {row.unit}" if row.unit else ""
        cells = [Cell(printable(row.method)), Cell(printable(row.model)), Cell(printable(row.order) or "-")]
        cells += [Cell(printable(row.metric)), Cell(f"{row.value:.10g}{unit}", row.value)]
        cells.append(Cell("-") if row.n_seeds is None else Cell(str(row.n_seeds), float(row.n_seeds)))
        cells += [
            Cell(printable(row.protocol, 200)),
            Cell(printable(row.source, 200), None, printable(row.remark, 200)),
        ]
        cells.append(Cell(PROVENANCE.get(row.provenance, row.provenance)))
        rows.append(Row(cells))
    grid = Grid(id=f"published-{number + 1}", title=printable(found.title, 200), columns=columns, rows=rows)
    return Published(title=printable(found.title, 200), warnings=found.warnings, grid=grid)
