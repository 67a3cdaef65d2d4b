r"""`residency report --paper`: one table for a paper, with what its reader must know beside it.

Mean ± standard deviation over seeds and orders of domains. The best of a column is bold only where it is shown to be
better than every other row (one family per column, Holm); a column without such a row has no bold number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from residency.core.errors import UserError
from residency.metrics.discovery import matrix_metrics, printed_sign
from residency.report.evidence.decision import decide
from residency.report.evidence.effects import ORDER
from residency.report.evidence.findings import Findings
from residency.report.evidence.samples import METRICS, columns_with
from residency.report.page.files import place, tex
from residency.report.page.glossary import WORDS
from residency.report.records.arms import Arm
from residency.report.records.records import Entry, Records

__all__ = ["PaperTable", "paper_table", "write_paper"]

_TITLES = {"average": "at the end", "learning": "just learnt", "forgetting": "forgetting", "general": "general ability"}
_GOOD = {True: r"$\uparrow$", False: r"$\downarrow$"}


@dataclass(frozen=True, kw_only=True)
class _Column:
    scorer: str
    metric: str
    up: bool


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """The numbers of the table.

    Args:
        columns: (scorer, metric, whether higher is better) in order.
        rows: Method -> per column (mean, sd, number of runs); `None` where a score is missing; sd `None` of one run.
        best: Per column the method that is shown to be better than all others, or `None`.
        told: Methods that were told the domain at test time; they are never the best.
    """

    columns: Sequence[_Column]
    rows: Mapping[str, Sequence[tuple[float, float | None, int] | None]]
    best: Sequence[str | None]
    told: frozenset[str]


def paper_table(records: Records, arms: Sequence[Arm], findings: Findings, metrics: Sequence[str]) -> PaperTable:
    """The chosen metrics of every method.

    Args:
        records: What the report is about.
        arms: Its arms.
        findings: Its evidence.
        metrics: METRIC, SCORER (its average at the end) or SCORER/METRIC.

    Raises:
        UserError: There is no such metric or scorer.
    """
    columns = [_column(text, records, arms) for text in metrics]
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        settings = [value for axis, value in arm.context if axis != ORDER and value]
        groups.setdefault(" · ".join([arm.value, *settings]), []).append(arm)
    rows = {name: [_cell(own, column, arms, findings) for column in columns] for name, own in groups.items()}
    # A value that stands in several rows is judged over all of them: none of its rows is the best by itself.
    values = [own[0].value for own in groups.values()]
    single = {own[0].value: name for name, own in groups.items() if values.count(own[0].value) == 1}
    best = [_best(column, arms, findings) for column in columns]
    told = frozenset(name for name, own in groups.items() if any(arm.oracle for arm in own))
    return PaperTable(columns=columns, rows=rows, best=[single.get(v or "") for v in best], told=told)


def write_paper(table: PaperTable, records: Records, folder: Path) -> Path:
    """`paper/table.tex` (a float with caption and notes) and `paper/definitions.tex` beside the page.

    Args:
        table: Its numbers.
        records: What they are about.
        folder: Of the report.

    Returns:
        The table.
    """
    place(folder / "paper" / "table.tex", _latex(table, records))
    words = [rf"\item[{tex(word)}] {tex(meaning)}" for word, meaning in WORDS.items()]
    place(
        folder / "paper" / "definitions.tex", "\n".join([r"\begin{description}", *words, r"\end{description}"]) + "\n"
    )
    return folder / "paper" / "table.tex"


def _column(text: str, records: Records, arms: Sequence[Arm]) -> _Column:
    entries = [entry for arm in arms for entry in arm.done]
    scorers = list(dict.fromkeys(name for entry in entries for name in entry.record["scores"]))
    scorer, _, metric = text.rpartition("/")
    if not scorer and text in scorers:
        scorer, metric = text, "average"
    scorer = scorer or records.scorer
    known = matrix_metrics()
    if scorer not in scorers or metric not in {*METRICS, *known}:
        raise UserError(
            f"--paper {text}",
            why=f"the scorers here are {', '.join(scorers) or 'none'}",
            fix=f"give METRIC, SCORER or SCORER/METRIC; metrics are {', '.join(dict.fromkeys([*METRICS, *known]))}",
        )
    higher = next(bool(e.record["scores"][scorer]["higher_is_better"]) for e in entries if scorer in e.record["scores"])
    up = metric != "forgetting" and (known[metric].about.kind != "loss" if metric in known else True)
    up = up and (higher or printed_sign(metric, higher_is_better=higher) > 0)
    return _Column(scorer=scorer, metric=metric, up=up)


def _cell(
    own: Sequence[Arm], column: _Column, arms: Sequence[Arm], findings: Findings
) -> tuple[float, float | None, int] | None:
    # The same domains in every row, also where a scorer does not fit all of them.
    domains = columns_with([entry for arm in arms for entry in arm.entries if entry.done], column.scorer)
    values = [_value(entry, column, domains, findings) for arm in own for entry in arm.entries if entry.done]
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return fmean(known), stdev(known) if len(known) > 1 else None, len(known)


def _value(entry: Entry, column: _Column, domains: tuple[str, ...], findings: Findings) -> float | None:
    """Of one run, in the direction that tables print."""
    scorer, metric = column.scorer, column.metric
    entry_scores = (entry.record.get("scores") or {}).get(scorer)
    if entry_scores is None:
        return None
    higher = bool(entry_scores["higher_is_better"])
    if metric not in METRICS:
        value = ((entry.record.get("summary") or {}).get(scorer) or {}).get(metric)
        return None if value is None else printed_sign(metric, higher_is_better=higher) * float(value)
    sample = findings.study.sample(entry, scorer, metric, domains)
    sign = -1.0 if metric == "forgetting" else printed_sign(metric, higher_is_better=higher)
    return None if sample is None else sign * sample.value


def _best(column: _Column, arms: Sequence[Arm], findings: Findings) -> str | None:
    """The value that is shown to be better than every other one."""
    if column.metric not in METRICS:
        return None
    values = dict.fromkeys(arm.value for arm in arms if arm.value not in findings.excluded)
    levels = {v: findings.level(v, column.metric, column.scorer) for v in values}
    known = {v: level for v, level in levels.items() if level is not None}
    if len(known) < 2 or len(known) < len(levels):
        return None
    best = max(known, key=lambda v: known[v])
    study = findings.study
    rest = [
        study.main_effect(findings.subject, best, column.metric, column.scorer, against=v) for v in known if v != best
    ]
    return best if all(e.word == "better" for e in decide(rest, alpha=findings.alpha)) else None


def _latex(table: PaperTable, records: Records) -> str:
    heads = [
        rf"\makecell[r]{{{tex(c.scorer)}\\{tex(_TITLES.get(c.metric, c.metric))} {_GOOD[c.up]}}}" for c in table.columns
    ]
    digits = [_digits([row[k] for row in table.rows.values()]) for k in range(len(table.columns))]
    lines = []
    for name, row in table.rows.items():
        cells = [_shown(cell, digits[k], bold=table.best[k] == name) for k, cell in enumerate(row)]
        lines.append(" & ".join([tex(name) + r"$^\dagger$" * (name in table.told), *cells]) + r" \\")
    return "\n".join(
        [
            "% needs \\usepackage{booktabs} and \\usepackage{makecell}",
            r"\begin{table}",
            r"\centering",
            rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
            r"\toprule",
            " & ".join([tex(records.subject), *heads]) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{_caption(table, records)}}}",
            rf"\label{{tab:{''.join(ch for ch in records.title if ch.isalnum() or ch in '-_') or 'residency'}}}",
            r"\end{table}",
            "",
        ]
    )


def _caption(table: PaperTable, records: Records) -> str:
    done = [entry for entry in records.done if entry.reference is None]
    seeds = len({str(entry.record.get("seed")) for entry in done})
    orders = len({tuple(entry.record["domains"]) for entry in done})
    over = f"{seeds} seed{'s' * (seeds != 1)}" + (f" and {orders} orders of domains" if orders > 1 else "")
    missing = len([e for e in records.entries if e.reference is None]) - len(done)
    bold = (
        "Bold: shown to be better than every other row of the column (paired t-test over seeds and test rows, Holm)."
        if any(table.best)
        else "No row is shown to be better than every other one in any column, so none is bold."
    )
    gaps = f" {missing} cells are missing." if missing else ""
    gaps += r" $\dagger$: told the domain at test time, not compared." if table.told else ""
    meaning = "Forgetting above 0 is bad." if any(c.metric == "forgetting" for c in table.columns) else ""
    spread = r"Mean $\pm$ standard deviation" if seeds * orders > 1 else "One run per row"
    return tex(f"{records.title}.") + f" {spread} over {over}. " + " ".join(filter(None, [meaning, bold])) + gaps


def _digits(cells: Sequence[tuple[float, float | None, int] | None]) -> int:
    return 3 if all(abs(cell[0]) <= 1 for cell in cells if cell is not None) else 2


def _shown(cell: tuple[float, float | None, int] | None, digits: int, *, bold: bool) -> str:
    if cell is None:
        return "--"
    mean, sd, _ = cell
    number = rf"\mathbf{{{mean:.{digits}f}}}" if bold else f"{mean:.{digits}f}"
    return f"${number}$" if sd is None else rf"${number} \pm {sd:.{digits}f}$"
