"""What becomes of texts on their way to the model: unknown, changed, or taken for control tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from residency.core.errors import UserError
from residency.core.types import Row, Split
from residency.domains.base import Domain
from residency.domains.doctor.finding import Column, Finding, make_finding

__all__ = ["Reader", "check_tokens", "check_vocabulary"]

_SAMPLE = 20_000  # rows of a split whose texts go through the tokenizer and back


class Reader:
    """A tokenizer and what the model behind it can read.

    Args:
        tokenizer: Of transformers.
        vocabulary: Rows of the embedding; `None` = not known.
        context: Positions of the model; `None` = not known.
    """

    def __init__(self, tokenizer: Any, *, vocabulary: int | None = None, context: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.context = context

    @cached_property
    def unknown(self) -> int | None:
        """The token that stands for what is not known, also where only the tokenizer's file names one."""
        known = self.tokenizer.unk_token_id
        if known is None:
            inner = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
            name = getattr(inner, "unk_token", None)
            known = None if name is None else self.tokenizer.convert_tokens_to_ids(name)
        # Some name their end token as the unknown one as well (GPT-2): that says nothing.
        return None if known == self.tokenizer.eos_token_id else known

    @cached_property
    def tokens_per_byte(self) -> int:
        """A bound: byte-level tokenizers make at most one token of a byte; others normalise first."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return 1 if "ByteLevel" in type(getattr(backend, "pre_tokenizer", None)).__name__ else 4

    @cached_property
    def control(self) -> re.Pattern[str] | None:
        """Texts that the tokenizer takes for control tokens."""
        known = sorted({*self.tokenizer.all_special_tokens}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, known))) if known else None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added."""
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer([*texts], add_special_tokens=False).input_ids
        return found


def check_tokens(column: Column, split: Split, reader: Reader) -> Iterator[Finding]:
    """Unknown tokens, texts that change, control tokens, among the first rows of a split (they are a fair sample)."""
    rows = column.splits[split][:_SAMPLE]
    where, of = (column.name, split), len(rows)
    if (left := len(column.splits[split]) - of) > 0:
        yield make_finding(
            "texts_sampled", "info", where, (), of=of + left, count=left,
            got=f"{{n}} rows are not looked through for texts that the tokenizer changes, of {of + left}",
            why="the first rows are a fair sample of them", fix="nothing has to be done; a run counts all it reads",
        )  # fmt: skip
    yield from _control(column, rows, where, reader)
    if hasattr(reader.tokenizer, "label_token"):
        # A classifier chooses its labels by number: their texts never meet the tokenizer.
        rows = tuple(replace(row, completion="") for row in rows)
    answers = reader.ids([row.completion for row in rows])
    yield from _unknown(rows, answers, where, reader)
    changed = [row for row, back in zip(rows, _written(answers, reader), strict=True) if back != row.completion.split()]
    if changed:
        (ids,) = reader.ids([changed[0].completion])
        back = reader.tokenizer.decode(ids)
        yield make_finding(
            "changed_answer", "error" if len(changed) > 0.5 * of else "warning", where, (r.id for r in changed), of=of,
            got=f"{{n}} completions are not what the tokenizer writes back: {changed[0].completion[:40]!r} becomes "
            f"{back.strip()[:40]!r}",
            why="a model of this tokenizer cannot write them: where only case and accents go, texts are compared with "
            "what is left; elsewhere their scores are low by construction",
            fix="bring the completions into the tokenizer's form (case, marks), or take another model",
        )  # fmt: skip


def _written(ids: Sequence[list[int]], reader: Reader) -> list[list[str]]:
    return [reader.tokenizer.decode(one).split() for one in ids]


def _unknown(
    rows: Sequence[Row], answers: Sequence[list[int]], where: tuple[str, str], reader: Reader
) -> Iterator[Finding]:
    unknown, asked = reader.unknown, reader.ids([row.prompt for row in rows])
    said = [row.completion for row in rows], answers
    for name, texts, found in (("completions", *said), ("prompts", [row.prompt for row in rows], asked)):
        # A tokenizer without a token for it leaves out what it does not know.
        pairs = zip(rows, texts, found, strict=True)
        ids = [
            row.id for row, text, of in pairs if (unknown is not None and unknown in of) or (text.strip() and not of)
        ]
        if ids:
            grave = name == "completions" and len(ids) > 0.01 * len(rows)
            yield make_finding(
                "unknown_tokens", "error" if grave else "warning", where, ids, of=len(rows),
                got=f"{{n}} {name} have characters or words that the tokenizer does not know",
                why="the model reads and learns the unknown token in their place, and looks as if it had learnt",
                fix="take a model whose tokenizer knows this language and these signs",
            )  # fmt: skip


def _control(column: Column, rows: Sequence[Row], where: tuple[str, str], reader: Reader) -> Iterator[Finding]:
    pattern = reader.control
    met = [row for row in rows if pattern and (pattern.search(row.prompt) or pattern.search(row.completion))]
    if not met:
        return
    special = {*reader.tokenizer.all_special_ids}
    row = met[0]
    assert pattern is not None
    example = column.domain.template.encode(reader.tokenizer, domain=column.name, row=row)
    taken = special & {*example.prompt[1:], *example.completion[:-1]}
    text = (pattern.search(row.prompt) or pattern.search(row.completion))[0]  # type: ignore[index]
    yield make_finding(
        "control_text", "error" if taken else "info", where, (r.id for r in met), of=len(rows),
        got=f"{{n}} rows have the text {text!r} in them" + (", which becomes a control token" if taken else ""),
        why="a control token in a row ends or restarts the text where nobody meant it to" if taken else
        "the tokenizer has a control token of that name; here it stays text",
        fix="write it in another way in these rows",
    )  # fmt: skip


def check_vocabulary(columns: Sequence[Column], reader: Reader) -> Iterator[Finding]:
    """Tokens that have no row in the model's embedding, and limits beyond what it reads."""
    size = reader.vocabulary
    beyond = sorted((i, t) for t, i in reader.tokenizer.get_vocab().items() if size is not None and i >= size)
    for column in columns:
        limit = getattr(column.domain.template, "max_tokens", None)
        if reader.context is not None and limit is not None and limit > reader.context:
            yield make_finding(
                "too_long_for_model", "error", (column.name, "train"), (), of=1, count=1,
                got=f"template.max_tokens is {limit}, the model reads {reader.context}",
                why="positions beyond were never trained", fix=f"set template.max_tokens to at most {reader.context}",
            )  # fmt: skip
    if not beyond:
        return
    names = dict(beyond)
    used = _used(columns, names, reader)
    for (name, split), rows in used.items():
        yield make_finding(
            "beyond_vocabulary", "error", (name, split), rows, of=len(rows),
            got=f"{{n}} rows have tokens that the model does not, such as {beyond[0][1]!r} (id {beyond[0][0]})",
            why=f"the embedding has {size} rows", fix="take the tokenizer that belongs to the model",
        )  # fmt: skip
    if not used:
        yield make_finding(
            "beyond_vocabulary", "info", ("", ""), (), of=1, count=len(beyond),
            got=f"the tokenizer has {{n}} tokens more than the model, such as {beyond[0][1]!r}",
            why=f"the embedding has {size} rows; no row of the data has such a token", fix="nothing has to be done",
        )  # fmt: skip


def _used(columns: Sequence[Column], names: Mapping[int, str], reader: Reader) -> dict[tuple[str, str], list[str]]:
    pattern = re.compile("|".join(map(re.escape, names.values())))
    found: dict[tuple[str, str], list[str]] = {}
    for column in columns:
        for split, rows in column.splits.items():
            suspects = [row for row in rows if pattern.search(f"{row.prompt}\n{row.completion}")]
            ids = [r.id for r in suspects if names.keys() & {*_all_ids(column.domain, column.name, r, reader)}]
            if ids:
                found[column.name, split] = ids
    return found


def _all_ids(domain: Domain, name: str, row: Row, reader: Reader) -> tuple[int, ...]:
    try:
        example = domain.template.encode(reader.tokenizer, domain=name, row=row)
    except UserError:
        return ()
    return (*example.prompt, *example.completion)
