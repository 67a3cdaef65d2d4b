"""Examples in the prompt: training rows with their answers before a row that is scored (few-shot)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from residency.core.errors import UserError
from residency.core.types import Example, Row
from residency.domains.template import Template

__all__ = ["encode_with_shots", "pick_shots"]

_BETWEEN = "\n\n"


def pick_shots(rows: Sequence[Row], count: int) -> tuple[Row, ...]:
    """The first training rows, one of every answer before a second one of any: each class is shown where there is room.

    The same for all rows that are scored, so that a column is one task. Rows of a domain come in hash order, so the
    first are a fair sample.

    Args:
        rows: Training rows.
        count: How many.
    """
    turns: dict[str, int] = {}
    ranked = []
    for place, row in enumerate(rows):
        turns[row.completion] = turns.get(row.completion, 0) + 1
        ranked.append((turns[row.completion], place))
    return tuple(rows[place] for _, place in sorted(ranked)[:count])


def encode_with_shots(
    encode: Callable[..., Example], template: Any, shots: Sequence[Row], *, row: Row, labels: Sequence[str] = ()
) -> Example:
    """A row with examples before it: as many as fit without anything being cut; `fewer_shots` counts the others.

    Args:
        encode: Of the template, for one domain and split.
        template: Gives the examples the form that rows have.
        shots: The examples.
        row: What is scored.
        labels: Its alternatives.

    Raises:
        UserError: The template is none of plain text.
    """
    if not isinstance(template, Template) or row.messages:
        raise UserError(
            f"data.shots={len(shots)} and a row of {type(template).__name__}",
            why="examples in the prompt are written for plain templates with prompt and completion",
            fix="set template: plain for the domain, or data.shots: 0",
        )
    for count in range(len(shots), 0, -1):
        texts = [_told(template, shot) for shot in shots[:count]]
        found = encode(row=replace(row, prompt=_BETWEEN.join([*texts, row.prompt])), labels=labels)
        if not (found.cut_prompt or found.cut_completion):
            return replace(found, fewer_shots=len(shots) - count)
    return replace(encode(row=row, labels=labels), fewer_shots=len(shots))


def _told(template: Template, shot: Row) -> str:
    """A training row as the template writes it."""
    asked = template.prompt.replace("{prompt}", shot.prompt)
    return asked + template.completion.replace("{completion}", shot.completion)
