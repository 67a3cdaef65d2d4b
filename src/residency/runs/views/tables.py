"""Records (the dicts of `results.json`) to rich tables.

Nothing is computed here. Comparisons of runs are the report's (`residency.report.tables.console`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from residency.core.errors import UserError
from residency.core.text import printable  # moved

__all__ = ["Record", "finite", "majority", "printable", "score_at", "score_table", "scores"]

Record = Mapping[str, Any]
_Axes = tuple[tuple[str, str], ...]

# Vermillion and blue of Okabe and Ito: told apart by every common colour vision, readable on black and on white.
WORSE, SLIGHTLY_WORSE, BETTER = "#D55E00", "#C98A2B", "#0072B2"
FLOOR = 1e-3  # Forgetting up to this is none.

_RIGHT = ("accuracy", "accuracy_norm", "accuracy_norm_bytes", "choice", "exact_match")
"""Scores that are the share of right labels; names that begin with the last are its variants."""


def finite(value: Any) -> float | None:
    """The number, or `None` for what counts as missing: null, NaN, infinite, not a number."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def scores(record: Record, scorer: str) -> Mapping[str, Any]:
    """`higher_is_better`, `unit` and `R` of one scorer; UserError if the record does not have it."""
    known: Mapping[str, Mapping[str, Any]] = record.get("scores") or {}
    if scorer not in known:
        raise UserError(
            f"no scorer {printable(scorer)!r} in cell {_state(record)}",
            why=f"its scorers are: {', '.join(map(printable, known)) or 'none'}",
            fix="name one of these scorers, or leave the cell out",
        )
    return known[scorer]


def score_at(matrix: Sequence[Sequence[object]], row: int, column: int) -> float | None:
    """R[row][column], `None` where it is missing or the record stops earlier."""
    return finite(matrix[row][column]) if row < len(matrix) and column < len(matrix[row]) else None


def majority(record: Record, scorer: str, column: str) -> float | None:
    """What the most frequent label of the training rows would score; `None` where the score is no share of labels."""
    if scorer not in _RIGHT and not scorer.startswith(_RIGHT[-1]):
        return None
    splits = ((record.get("data") or {}).get("domains") or {}).get(column) or {}
    return finite((splits.get("test") or {}).get("majority"))


def _digits(values: Iterable[float]) -> int:
    return 3 if all(abs(v) <= 1 for v in values) else 2


def _state(record: Record) -> str:
    return f"{printable(record.get('cell', '?'))} {printable(record.get('status') or 'missing')}"


def _direction(scorer: str, entry: Mapping[str, Any]) -> tuple[str, str]:
    """The scorer with its unit, and the direction in words."""
    unit = printable(entry.get("unit") or "unknown unit")
    return f"{printable(scorer)} in {unit}", f"{'higher' if entry.get('higher_is_better') else 'lower'} is better"


def score_table(record: Record, scorer: str) -> Table:
    """The score matrix of one run: a row per stage, a column per domain, then the probes."""
    entry, count, probes = scores(record, scorer), len(record["domains"]), list(record.get("probes") or [])
    names = [printable(name, 24) for name in (*record["domains"], *probes)]
    digits = _digits(v for row in entry["R"] for v in map(finite, row) if v is not None)
    told = " (told the domain at test time)" if record.get("task_id_at_test") else ""
    caption = (
        f"{', '.join(_direction(scorer, entry))}\n◆ just learned; since then ▼ worse, ▲ better, = unchanged"
        f"{'; probes: since base' if probes else ''}; - missing\nforgetting > 0 is bad"
    )
    title = f"{printable(record.get('cell', '?'))}: {printable(scorer)}{told}"
    table = Table("", title=Text(title), box=SIMPLE_HEAD, caption=Text(caption), caption_justify="left")
    gap = [""] * bool(probes)
    for name in (*names[:count], *gap, *names[count:]):
        table.add_column(Text(name), justify="right", no_wrap=True)
    for row, after in enumerate(["base", *(f"after {name}" for name in names[:count])]):
        cells = [_cell(entry, row, column, count, digits) for column in range(len(names))]
        table.add_row(Text(after), *cells[:count], *gap, *cells[count:])
    lines = [majority(record, scorer, name) for name in (*record["domains"], *probes)]
    if any(line is not None for line in lines):
        shown = ["-" if line is None else f"{line:.{digits}f} {'':<{digits + 3}}" for line in lines]
        table.add_row(Text("majority"), *shown[:count], *gap, *shown[count:], style="dim")
    return table


def _cell(entry: Mapping[str, Any], row: int, column: int, domains: int, digits: int) -> Text:
    value, start = score_at(entry["R"], row, column), column + 1 if column < domains else 0
    width = digits + 3  # of the mark behind the number: numbers stay below each other
    if value is None:
        return Text(f"- {'':<{width}}", style="dim")
    number, before = f"{value:.{digits}f} ", score_at(entry["R"], start, column)
    if row == start and column < domains:
        return Text(f"{number}{'◆':<{width}}", style="bold")
    if row <= start or before is None:
        return Text(f"{number}{'':<{width}}", style="dim")
    lost = before - value if entry["higher_is_better"] else value - before
    mark, base = f"{abs(lost):.{digits}f}", score_at(entry["R"], 0, column) if column < domains else 0.0
    if not float(mark):
        return Text(f"{number}{'=':<{width}}")
    share = lost / (abs(before - (base or 0.0)) or math.inf)  # of what had been gained
    shade = BETTER if lost < 0 else SLIGHTLY_WORSE if share < 0.1 else WORSE if share < 0.5 else f"bold {WORSE}"
    return Text.assemble(number, (f"{'▼' if lost > 0 else '▲'}{mark:<{width - 1}}", shade))
