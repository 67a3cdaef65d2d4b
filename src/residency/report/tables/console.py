"""The methods of a report, and what it says, for a terminal: the numbers and words of the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from residency.runs.views.tables import BETTER, WORSE, finite, printable

if TYPE_CHECKING:
    from residency.report.advice.advice import Advice

__all__ = ["methods_table", "spoken"]

_METRICS = {"average": "at the end", "learning": "learnt", "bwt": "bwt", "forgetting": "forgetting"}
_SHADES = {"better": BETTER, "worse": WORSE}
_WORDS = {"better": "▲ better", "worse": "▼ worse", "open": "not shown", "missing": "-"}


def methods_table(rows: Sequence[Mapping[str, Any]], *, scorer: str, unit: str, higher: bool) -> Table:
    """One row per method: mean ± sd over seeds, and the decision about its difference to the baseline.

    Args:
        rows: Of the report's table `methods`; references are left out.
        scorer: What the numbers are about.
        unit: Of the scores.
        higher: Whether higher scores are better.
    """
    own = [row for row in rows if row["role"] != "reference"]
    shown = [v for row in own for key in ("average", "learning") if (v := finite(row.get(key))) is not None]
    digits = 3 if all(abs(v) <= 1 for v in shown) else 2
    notes = any(row.get("note") for row in own)
    names = ("seeds", *_METRICS.values(), "better by", "evidence", "seconds", "extra state")
    columns = [Column("method", overflow="fold", min_width=8)]
    # Headings of two words stand in two lines: the names of the methods need the room on a terminal of 80 columns.
    columns += [Column("\n".join(name.rsplit(" ", 1)), justify="right", no_wrap=True) for name in names]
    columns += [Column("note", overflow="fold", min_width=8)] * notes
    caption = (
        f"{printable(scorer)} in {printable(unit)}: {'higher' if higher else 'lower'} is better; bwt < 0 and "
        "forgetting > 0 is bad; ± sd over seeds\n"
        "better by, evidence: at the end against the baseline, corrected for all comparisons"
    )
    table = Table(*columns, box=SIMPLE_HEAD, padding=0, caption=Text(caption), caption_justify="left")
    for row in own:
        table.add_row(*_cells(row, digits), *[Text(printable(row.get("note") or "", 200))] * notes)
    return table


def _cells(row: Mapping[str, Any], digits: int) -> Iterator[Text]:
    yield Text(printable(row["method"], 60))
    yield Text(str(row["seeds"]))
    for metric in _METRICS:
        mean, sd = finite(row.get(metric)), finite(row.get(f"{metric} sd"))
        spread = "" if sd is None else f"\n±{sd:.{digits}f}"
        yield Text("-" if mean is None else f"{mean:.{digits}f}{spread}")
    better, word = finite(row.get("better by")), row.get("evidence")
    if row.get("baseline"):
        yield from (Text(""), Text("baseline"))
    else:
        yield Text("-" if better is None else f"{better:+.{digits}f}")
        yield Text(_WORDS.get(str(word), "-" if word is None else str(word)), _SHADES.get(str(word), ""))
    seconds, state = finite(row.get("seconds")), finite(row.get("state bytes"))
    yield Text("-" if seconds is None else f"{seconds:,.0f}")
    yield Text("-" if state is None else decimal(round(state)))


def spoken(advice: Advice) -> str:
    """What the page says, in lines; names are escaped for `rich.print`."""
    lines = [f"{advice.headline}. Evidence: {advice.evidence}.", advice.lead]
    lines += [*advice.reasons, *(f"Mind: {limit}" for limit in advice.limits)]
    return escape("\n".join(lines))
