"""A conversation as one row per answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from residency.core.types import Row
from residency.domains.readers.conversations import answer_text, before_text

__all__ = ["split_into_turns"]


def split_into_turns(rows: Iterable[Row]) -> list[Row]:
    """Every answer of every conversation as the last one of a row of its own; other rows as they are.

    For templates that write earlier answers in another way than last ones: each answer is trained as the model will
    see it, at the price of reading what came before it again. The new rows are of one group.
    """
    return [part for row in rows for part in (_parts(row) if row.kind == "messages" else [row])]


def _parts(row: Row) -> list[Row]:
    ends = [k + 1 for k, turn in enumerate(row.messages) if turn["role"] == "assistant" and turn.get("weight") != 0]
    found = []
    for number, end in enumerate(ends, 1):
        turns = tuple(
            {**turn, "weight": 0} if turn["role"] == "assistant" and k + 1 < end else turn
            for k, turn in enumerate(row.messages[:end])
        )
        before, said = before_text(turns), answer_text(turns[-1])
        place = {"id": f"{row.id}#{number}", "group": row.group or row.id}
        found.append(replace(row, messages=turns, prompt=before, completion=said, **place))  # type: ignore[arg-type]
    return found
