"""What of a user's rows and tokens takes no part, as one kind of number, wherever it is lost.

Whoever leaves something out gives a `LeftOut`; console, results.json (`data.left_out`) and report show all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from residency.core.text import printable
from residency.core.types import Row
from residency.domains.token_counts import TokenCounts

__all__ = ["LeftOut", "in_words", "of_limits", "of_rows", "of_tokens", "told"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Something of a domain that takes no part.

    Args:
        column: Domain or probe; a reader leaves it empty.
        split: Of it; empty = of all.
        what: Stable name of the place where it happens, such as `max_rows` or `cut_prompt`.
        unit: What is counted: rows, prompts, completions, columns, ...
        count: How many are left out.
        of: How many there are.
        how: The rest of the sentence "count of unit ...".
        tokens: How many tokens that costs, where that is known.
    """

    column: str = ""
    split: str = ""
    what: str
    unit: str
    count: int
    of: int
    how: str
    tokens: int = 0

    def of_column(self, name: str) -> LeftOut:
        """The same with the name of its column."""
        return replace(self, column=name)

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def in_words(entry: Mapping[str, Any]) -> str:
    """`4 of 14 prompts cut by 93 tokens`."""
    return f"{entry['count']:,} of {entry['of']:,} {entry['unit']} {entry['how']}"


def told(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line per sentence, with all columns of which it is true: `a, b, train: 4 of 14 prompts cut by 93 tokens`."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        found.setdefault((entry["split"], in_words(entry)), []).append(printable(entry["column"], 24))
    return [
        ", ".join([*columns, split] if split else columns) + f": {words}" for (split, words), columns in found.items()
    ]


def of_limits(split: str, counts: Mapping[str, Any], *, whole: bool) -> Iterator[LeftOut]:
    """What the limits do to a split.

    Args:
        split: Its name.
        counts: `LengthCounts` as JSON values.
        whole: Whether cuts and overlong rows count as well: not where `of_tokens` says it of the same rows.
    """
    given, rows, too_long = counts["given"], counts["rows"], counts["too_long"]
    unused = given - rows - too_long
    yield LeftOut(split=split, what="max_rows", unit="rows", count=unused, of=given, how=f"not used (max_{split})")
    if whole:
        cuts = (
            (counts["cut_prompts"], counts["cut_prompt_tokens"]),
            (counts["cut_answers"], counts["cut_answer_tokens"]),
        )
        yield from _of_cuts(split, rows, too_long, *cuts)


def of_tokens(split: str, counts: TokenCounts) -> Iterator[LeftOut]:
    """What becomes of the tokens of the rows that are trained on or scored."""
    rows, tokens = counts.rows, counts.prompt_tokens + counts.supervised_tokens
    yield from _of_cuts(split, rows, counts.left_out, counts.prompts_cut, counts.completions_cut)
    fewer, shots = counts.shots_left_out
    found = (
        ("unwritable", "completions", counts.unwritable, rows, "cannot be written exactly with this tokenizer"),
        ("unknown", "tokens", counts.unknown, tokens, "stand for text that the tokenizer does not know"),
        ("same_answers", "rows", counts.same_answers, rows, "have two answers of the same tokens: none can win"),
        ("shots", "rows", fewer, rows, f"have fewer examples before them than data.shots, {shots:,} fewer in all"),
    )
    for what, unit, count, of, how in found:
        yield LeftOut(split=split, what=what, unit=unit, count=count, of=of, how=how)


def _of_cuts(
    split: str, rows: int, too_long: int, prompts: tuple[int, int], completions: tuple[int, int]
) -> Iterator[LeftOut]:
    of = rows + too_long
    yield LeftOut(split=split, what="too_long", unit="rows", count=too_long, of=of, how="left out (too long)")
    (p, p_tokens), (c, c_tokens) = prompts, completions
    how = f"cut by {p_tokens:,} tokens"
    yield LeftOut(split=split, what="cut_prompt", unit="prompts", count=p, of=rows, how=how, tokens=p_tokens)
    how = f"cut by {c_tokens:,} tokens, their end tokens with them"
    yield LeftOut(split=split, what="cut_answer", unit="completions", count=c, of=rows, how=how, tokens=c_tokens)


def of_rows(rows: Iterable[Row]) -> Iterator[LeftOut]:
    """What training rows hold that no objective reads."""
    answers = further = 0
    for row in rows:
        answers += 1 + len(row.references)
        further += len(row.references)
    how = "not learnt (the first of a row is)"
    yield LeftOut(split="train", what="references", unit="right answers", count=further, of=answers, how=how)
