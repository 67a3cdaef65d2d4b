"""What the limits do to rows: which are cut or left out, and how many tokens that costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from residency.core.types import Row, Split
from residency.domains.doctor.finding import Column, Finding, make_finding
from residency.domains.doctor.tokens import Reader
from residency.domains.lengths import model_limits
from residency.domains.template import Template
from residency.domains.token_counts import ALLOWED_SHARE

__all__ = ["LengthCounts", "count_lengths", "length_findings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthCounts:
    """What the limits do to the rows of a split.

    Args:
        rows: Rows used.
        given: Rows there were before `max_<split>`.
        cut_prompts: Rows whose prompt is cut.
        cut_prompt_tokens: Tokens that this costs.
        cut_answers: Rows whose completion is cut; all of these lose their end token.
        cut_answer_tokens: Tokens that this costs.
        longest: Tokens of the longest row before any cut, among those that may be too long.
        too_long: Training rows that are left out because they are longer than the limits; not among `rows`.
    """

    rows: int
    given: int
    cut_prompts: int = 0
    cut_prompt_tokens: int = 0
    cut_answers: int = 0
    cut_answer_tokens: int = 0
    longest: int = 0
    too_long: int = 0


def count_lengths(column: Column, split: Split, reader: Reader) -> tuple[LengthCounts, list[str], list[str]]:
    """(counts, ids of rows with a cut prompt, ids of rows with a cut completion) of a split; every row is counted.

    A row with fewer bytes than the limit has tokens cannot be cut, and is not tokenised.
    """
    rows, template = column.splits[split], column.domain.template
    prompts, answers, lost, gone, longest, left_out = [], [], 0, 0, 0, 0
    drops = split == "train" and template.too_long in (None, "drop", "refuse")
    for row in _maybe_long(template, rows, split, reader):
        example = template.encode(reader.tokenizer, domain=column.name, row=row, split=split)
        cut, short = example.cut_prompt, example.cut_completion
        # Of a row that is left out nothing is cut: all of it is still there.
        whole = len(example) + short + (cut if len(example.branches) and template.too_long == "truncate" else 0)
        longest = max(longest, whole)
        if drops and cut:
            left_out += 1
            continue
        if cut:
            prompts.append(row.id)
        if short:
            answers.append(row.id)
        lost, gone = lost + cut, gone + short
    counts = LengthCounts(
        rows=len(rows) - left_out,
        given=column.given.get(split, len(rows)),
        cut_prompts=len(prompts),
        cut_prompt_tokens=lost,
        cut_answers=len(answers),
        cut_answer_tokens=gone,
        longest=longest,
        too_long=left_out,
    )
    return counts, prompts, answers


def _maybe_long(template: Any, rows: Sequence[Row], split: Split, reader: Reader) -> Iterator[Row]:
    """Rows that may be longer than the limits: those of a plain template with fewer bytes than tokens are not."""
    if not isinstance(template, Template):
        yield from rows
        return
    limits = model_limits(reader.tokenizer, template.max_tokens, template.max_prompt_tokens, template.too_long, split)
    per, frame = reader.tokens_per_byte, len(template.prompt.encode()) + len(template.completion.encode()) + 8
    allowed = min(limits.tokens, limits.prompt or limits.tokens)
    for row in rows:
        asked, said = (_bytes(text) * per + frame for text in (row.prompt, max(row.completion, row.rejected, key=len)))
        if row.messages or asked + said >= limits.tokens or asked >= allowed:
            yield row


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def length_findings(
    column: Column, split: Split, counts: LengthCounts, prompts: Sequence[str], answers: Sequence[str]
) -> Iterator[Finding]:
    """What a user has to know of the counts."""
    where, template = (column.name, split), column.domain.template
    if counts.too_long:
        allowed = {None: ALLOWED_SHARE, "refuse": 0.0}.get(template.too_long, 1.0) * (counts.rows + counts.too_long)
        refused = counts.too_long > allowed or not counts.rows
        yield make_finding(
            "too_long", "error" if refused else "info", where, (), of=counts.rows + counts.too_long,
            count=counts.too_long,
            got=f"{{n}} rows are longer than the limits and left out; the longest has {counts.longest} tokens",
            why="a run refuses so many" if refused else
            "they go as they came: nothing of a training row is cut unless that is asked for",
            fix="raise template.max_tokens, or set template.too_long",
        )  # fmt: skip
    if (unused := counts.given - counts.rows - counts.too_long) > 0:
        yield make_finding(
            "rows_left_out", "info", where, (), of=counts.given, count=unused,
            got=f"{{n}} of {counts.given} rows are not used (max_{split})",
            why="a limit keeps a sample of them", fix=f"set max_{split}: null to use all",
        )  # fmt: skip
    if prompts:
        yield make_finding(
            "cut_prompt", "warning" if len(prompts) > 0.05 * counts.rows else "info", where, prompts, of=counts.rows,
            got=f"{{n}} prompts lose {counts.cut_prompt_tokens} tokens at their beginning "
            f"(max_prompt_tokens {getattr(template, 'max_prompt_tokens', None)})",
            why="instructions and questions usually stand there",
            fix=f"raise template.max_prompt_tokens; the longest row has {counts.longest} tokens",
        )  # fmt: skip
    if answers:
        yield make_finding(
            "cut_answer", "error" if len(answers) > 0.01 * counts.rows else "warning", where, answers, of=counts.rows,
            got=f"{{n}} completions lose {counts.cut_answer_tokens} tokens and their end token "
            f"(max_tokens {getattr(template, 'max_tokens', None)})",
            why="the model does not learn to stop, and what is scored by text cannot be written in full",
            fix=f"raise template.max_tokens; the longest row has {counts.longest} tokens",
        )  # fmt: skip
