"""Rows exactly as the model reads them, and the findings as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from residency.core.text import printable
from residency.core.types import Row, Split
from residency.domains.doctor.examine import Diagnosis
from residency.domains.doctor.finding import Column
from residency.domains.doctor.tokens import Reader

__all__ = ["print_diagnosis", "print_rows", "token_line"]

_COLOURS = {"error": "red", "warning": "yellow", "info": "dim"}


def token_line(column: Column, row: Row, reader: Reader) -> Text:
    """One row: supervised tokens in `[[ ]]`, control tokens in angle marks, blanks as dots, newlines as arrows."""
    example = column.domain.template.encode(reader.tokenizer, domain=column.name, row=row)
    line = Text(f"{printable(row.id)}  ", style="bold")
    line.append(_spelled(example.prompt, reader), style="bright_black")
    line.append(f"[[{_spelled(example.completion, reader)}]]", style="green underline")
    whole = [len(ids) for ids in reader.ids([row.prompt, row.completion])]
    if len(example.prompt) < whole[0] or len(example.completion) < whole[1]:
        line.append("  (cut)", style="red")
    line.append(f"\n{list(example.prompt)} -> {list(example.completion)}", style="dim")
    return line


def _spelled(ids: Sequence[int], reader: Reader) -> str:
    special = {*reader.tokenizer.all_special_ids}
    parts: list[str] = []
    run: list[int] = []
    for token in [*ids, -1]:
        if token in special or token == -1:
            parts.append(_safe(reader.tokenizer.decode(run)) if run else "")
            parts.append("" if token == -1 else f"\u27e8{reader.tokenizer.convert_ids_to_tokens(token)}\u27e9")
            run = []
        else:
            run.append(token)
    return "".join(parts)


def _safe(text: str) -> str:
    """Blanks and newlines made visible, and what a terminal would obey taken out."""
    shown = text.replace(" ", "\u00b7").replace("\n", "\u23ce")
    return "".join(c if c.isprintable() else "\ufffd" for c in shown)


def print_rows(console: Console, diagnosis: Diagnosis, reader: Reader, *, number: int) -> None:
    """The first rows of every split, the longest and the shortest, and those that findings name."""
    for column in diagnosis.columns:
        for split, rows in column.splits.items():
            if not rows:
                continue
            console.print(Text(f"\n{printable(column.name)} / {split}", style="bold underline"))
            for row in _chosen(diagnosis, column, split, rows, number):
                console.print(token_line(column, row, reader), soft_wrap=True)


def _chosen(diagnosis: Diagnosis, column: Column, split: Split, rows: Sequence[Row], number: int) -> Iterator[Row]:
    named = {
        row_id
        for one in diagnosis.findings
        if (one.domain, one.split) == (column.name, split)
        for row_id in one.rows[:number]
    }
    by_length = sorted(rows, key=lambda row: len(row.prompt) + len(row.completion))
    wanted = {row.id: row for row in [*rows[:number], by_length[0], by_length[-1]]}
    wanted |= {row.id: row for row in rows if row.id in named}
    yield from wanted.values()


def print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """A table of what the limits do, then one of the findings, errors first."""
    table = Table(title="rows and what the limits do to them", title_justify="left")
    for title in ("domain", "split", "given", "used", "cut prompts", "cut answers", "lost ends"):
        table.add_column(title, justify="left" if title in ("domain", "split") else "right")
    for name, splits in diagnosis.counts.items():
        for split, c in splits.items():
            numbers = (c.given, c.rows, c.cut_prompts, c.cut_answers, c.cut_answers)
            table.add_row(printable(name), split, *(f"{n:,}" for n in numbers))
    console.print(table)
    for one in diagnosis.findings:
        where = "/".join(part for part in (printable(one.domain), one.split) if part)
        rows = f"  rows: {', '.join(map(printable, one.rows))}" if one.rows else ""
        line = Text(f"{one.severity:8}", style=_COLOURS[one.severity])
        line.append(f"{where}  {printable(one.got, 500)}\n", style="default")
        told = {"why": printable(one.why, 500), "fix": f"{printable(one.fix, 500)}{rows}"}
        line.append("\n".join(f"         {word}: {text}" for word, text in told.items()), style="dim")
        console.print(line, soft_wrap=True)
    count = {kind: sum(one.severity == kind for one in diagnosis.findings) for kind in ("error", "warning", "info")}
    console.print(", ".join(f"{n} {kind}{'s' * (n != 1 and kind != 'info')}" for kind, n in count.items()))
