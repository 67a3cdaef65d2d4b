"""Records (the dicts of `results.json`) to rich tables and plain words.

No metric is computed here, only means over seeds and comparisons. `record["summary"]` holds utilities (higher is
better); `average` and `learning` are shown in the scorer's own direction, so a loss of 1.67 nats reads 1.67.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from residency.core.errors import UserError
from residency.core.text import printable  # moved

__all__ = ["Record", "comparison_table", "finite", "printable", "score_at", "score_table", "scores", "verdict"]

Record = Mapping[str, Any]
_Axes = tuple[tuple[str, str], ...]

# Vermillion and blue of Okabe and Ito: told apart by every common colour vision, readable on black and on white.
WORSE, SLIGHTLY_WORSE, BETTER = "#D55E00", "#C98A2B", "#0072B2"
AS_MUCH = 0.02  # Differences up to this share of the baseline are worded "as much".
FLOOR = 1e-3  # A percentage of less forgetting than this would be noise.
NUMBERS = ("n", "average", "learning", "bwt", "forgetting", "reduction", "seconds", "extra state")


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


@dataclass(kw_only=True)
class _Group:
    """The seeds of one point of a study, and what they are compared with."""

    scorer: str
    records: list[Record] = field(default_factory=list)
    baseline: _Group | None = None

    @property
    def done(self) -> list[Record]:
        return [r for r in self.records if r.get("status") == "done"]

    def values(self, metric: str) -> list[float]:
        """The metric of each finished seed that has it, `average` and `learning` in the scorer's direction."""
        own = metric in ("average", "learning")
        found = ((r, finite(((r.get("summary") or {}).get(self.scorer) or {}).get(metric))) for r in self.done)
        return [-v if own and not scores(r, self.scorer)["higher_is_better"] else v for r, v in found if v is not None]

    def mean(self, metric: str) -> float | None:
        return fmean(values) if (values := self.values(metric)) else None

    def show(self, metric: str, digits: int) -> str:
        """`mean ± sd`; a metric that some finished seed lacks names its own n."""
        values = self.values(metric)
        spread = f" ±{stdev(values):.{digits}f}" if len(values) > 1 else ""
        few = f" (n={len(values)})" if len(values) != len(self.done) else ""
        return f"{fmean(values):.{digits}f}{spread}{few}" if values else "-"

    def cost(self, name: str) -> float | None:
        """Mean cost of a finished seed; a cost given in parts is their sum."""
        found = ((r.get("cost") or {}).get(name) for r in self.done)
        known = [v for c in found if (v := finite(sum(c.values()) if isinstance(c, Mapping) else c)) is not None]
        return fmean(known) if known else None

    def less(self) -> float | None:
        """Percent less forgetting than the baseline, of the means; `None` where that means nothing."""
        own, base = self.mean("forgetting"), self.baseline.mean("forgetting") if self.baseline else None
        return None if own is None or base is None or base < FLOOR else 100 * (base - own) / base

    def notes(self) -> list[str]:
        """What must be known before comparing: cells that are not done, scores that are missing, task ids."""
        notes = [_state(r) for r in self.records if r.get("status") != "done"]
        lacking = [_state(r) for r in self.done if self.scorer not in (r.get("summary") or {})]
        notes += [f"{cell} without {printable(self.scorer)}" for cell in lacking]
        return notes + ["told the domain at test time"] * any(r.get("task_id_at_test") for r in self.records)


def _groups(records: Iterable[Record], scorer: str, baseline: str) -> dict[_Axes, _Group]:
    """Records by their axes, seeds together, in order of appearance."""
    groups: dict[_Axes, _Group] = {}
    for record in records:
        axes = {k: v for k, v in (record.get("axes") or {}).items() if k != "seed"} or {"cell": record.get("cell", "?")}
        key = tuple(sorted((printable(k), "none" if v is None else printable(v)) for k, v in axes.items()))
        groups.setdefault(key, _Group(scorer=scorer)).records.append(record)
    for key, group in groups.items():
        # The same point with its mitigation, or else another axis, set to the baseline.
        for at in sorted(range(len(key)), key=lambda i: key[i][0] == "mitigation"):
            same = (*key[:at], (key[at][0], printable(baseline)), *key[at + 1 :])
            group.baseline = groups.get(same, group.baseline)
    return groups


def comparison_table(records: Iterable[Record], scorer: str, *, baseline: str = "none") -> Table:
    """One row per point of a study, seeds averaged; what failed or is missing is listed, never dropped.

    Args:
        records: Records, also of failed or missing cells (`cell`, `status` and `axes` are enough for those).
        scorer: Which scorer is compared.
        baseline: Value of an axis (the mitigation, if there is one) that forgetting is compared with.
    """
    groups = _groups(records, scorer, baseline)
    entry, digits = _shared(groups.values(), scorer)
    caption = (
        f"{'; average and learning: '.join(_direction(scorer, entry))}; bwt < 0 and forgetting > 0 is bad\n"
        f"reduction of mean forgetting against '{printable(baseline)}'; ± sd over n seeds, none for one; - missing"
    )
    axes = list(dict.fromkeys(name for key in groups for name, _ in key))
    columns = [Column(Text(axis), overflow="fold", min_width=6) for axis in axes]
    columns += [Column(name, justify="right", no_wrap=True) for name in NUMBERS]
    columns += [Column("note", overflow="fold", min_width=8)] * any(group.notes() for group in groups.values())
    table = Table(*columns, box=SIMPLE_HEAD, padding=0, caption=Text(caption), caption_justify="left")
    for key, group in groups.items():
        less, seconds, state = group.less(), group.cost("seconds"), group.cost("mitigation_state_bytes")
        sign = "-" if less is None else f"{'▲' if less > 0 else '▼' if less < 0 else '='} {less:.0f} %"
        table.add_row(
            *(Text(dict(key).get(axis, "-")) for axis in axes),
            f"{len(group.done)}" + f"/{len(group.records)}" * (len(group.done) != len(group.records)),
            *(group.show(metric, digits).replace(" ", "\n") for metric in NUMBERS[1:5]),
            Text("baseline") if group.baseline is group else Text(sign, WORSE if (less or 0) < 0 else BETTER),
            "-" if seconds is None else f"{seconds:,.0f}",
            "-" if state is None else decimal(round(state)),
            *[Text("; ".join(group.notes()))] * (columns[-1].header == "note"),
        )
    return table


def _shared(groups: Iterable[_Group], scorer: str) -> tuple[Mapping[str, Any], int]:
    """What the scorer is (of the first finished cell that has it), and the digits to print."""
    entries = (scores(r, scorer) for g in groups for r in g.done if scorer in (r.get("scores") or {}))
    return next(entries, {}), _digits(v for g in groups for v in g.values("average") + g.values("learning"))


def verdict(records: Iterable[Record], scorer: str, *, baseline: str = "none") -> str:
    """What a study says about one scorer, in plain words; names are escaped for `rich.print`."""
    groups = _groups(records, scorer, baseline)
    entry, digits = _shared(groups.values(), scorer)
    of = unit if " per " in (unit := printable(entry.get("unit"))) else f"of {printable(scorer)}"
    said = [_sentence(" · ".join(v for _, v in key), group, of, digits) for key, group in groups.items()]
    seeds = min((len(g.done) for g in groups.values() if g.done), default=0)
    few = " (fewer than 6 cannot show significance without assuming a distribution)" * (seeds < 6)
    known = {0: "No cell is done.", 1: "One seed: no statement about significance."}
    said.append(known.get(seeds, f"{seeds} seeds, not tested{few}."))
    said += [f"Mind: {note}." for group in groups.values() for note in group.notes()]
    return escape(" ".join(said))


def _sentence(name: str, group: _Group, of: str, digits: int) -> str:
    forgot, learnt, base = group.mean("forgetting"), group.mean("learning"), group.baseline
    loss, skill, less = group.show("forgetting", digits), group.show("learning", digits), group.less()
    if forgot is None:
        return f"{name}: nothing to compare."
    if base is None or base is group or base.mean("forgetting") is None:
        name = f"Sequential training ({name})" if name.split()[-1:] == ["none"] else name
        return f"{name} {'forgets' if forgot > FLOOR else 'does not forget:'} {loss} {of} (learning {skill})."
    share = "" if less is None else f" {abs(less):.0f} % {'less' if less > 0 else 'more'}"
    forgets = "does not forget" if forgot <= FLOOR else f"forgets{share}"
    forgets = "forgets as much" if less is not None and abs(less) <= 100 * AS_MUCH else forgets
    said, had = f"{name} {forgets} ({loss} against {base.show('forgetting', digits)})", base.mean("learning")
    if learnt is None or had is None:
        return f"{said}; how much it learns is not known."
    better = (learnt > had) == scores(group.done[0], group.scorer)["higher_is_better"]
    learns = "as much" if abs(learnt - had) <= AS_MUCH * abs(had) else "more" if better else "less"
    return f"{said} and learns {learns} ({skill} against {base.show('learning', digits)})."
