"""Rewards that read the text of an answer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from re import _parser  # type: ignore[attr-defined]  # the only parser of patterns that is sure to agree with `re`
from typing import Any

from residency.core.errors import UserError
from residency.objectives.rewards.base import Answer, Question, Reward

__all__ = ["Contains", "ExactLabel", "JsonValid", "NumericEqual", "Regex"]

LONGEST = 10_000  # characters of an answer that a pattern is matched against
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


class ExactLabel(Reward):
    """1 if the answer is the row's completion, whatever the case and the blanks around it; else 0.

    Args:
        column: Of rows that are prompts alone: the column with the right answer; `null` = the completion.
    """

    needs_reference = True

    def __init__(self, *, column: str | None = None) -> None:
        self.column = column

    def __call__(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[float | None]:
        """0 or 1."""
        return [float(_bare(a.text) == _bare(self.expected(q))) for q, a in zip(questions, answers, strict=True)]


class Contains(Reward):
    """1 if the row's completion occurs in the answer, whatever the case; else 0. An answer that lists every label gets
    it too: `ExactLabel` does not pay for that.

    Args:
        column: Of rows that are prompts alone: the column with the right answer; `null` = the completion.
    """

    needs_reference = True

    def __init__(self, *, column: str | None = None) -> None:
        self.column = column

    def __call__(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[float | None]:
        """0 or 1."""
        return [float(_bare(self.expected(q)) in _bare(a.text)) for q, a in zip(questions, answers, strict=True)]


class NumericEqual(Reward):
    """1 if the last number of the answer is the last number of the row's completion; else 0.

    Args:
        tolerance: Largest relative difference.
        column: Of rows that are prompts alone: the column with the right answer; `null` = the completion.
    """

    needs_reference = True

    def __init__(self, *, tolerance: float = 1e-6, column: str | None = None) -> None:
        self.column = column
        if tolerance < 0:
            raise UserError(
                f"NumericEqual with tolerance={tolerance}",
                why="it is the largest relative difference of two numbers that count as equal",
                fix="give tolerance: 1.0e-6",
            )
        self.tolerance = tolerance

    def __call__(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[float | None]:
        """0 or 1; `None` where the completion has no number."""
        return [self._one(self.expected(q), a.text) for q, a in zip(questions, answers, strict=True)]

    def _one(self, reference: str, text: str) -> float | None:
        wanted, found = _last_number(reference), _last_number(text)
        if wanted is None:
            return None
        return float(found is not None and math.isclose(found, wanted, rel_tol=self.tolerance, abs_tol=1e-12))


class Regex(Reward):
    """1 if the whole answer matches a pattern, blanks around it aside; else 0.

    `re` has no time limit, so a repetition inside a repetition, which may take exponential time, is refused, and an
    answer of more than 10,000 characters does not match.

    Args:
        pattern: As `re` reads it; `null` = the row's completion is the pattern.
        column: Without a pattern, of rows that are prompts alone: the column with the pattern.

    Raises:
        UserError: No pattern, or one that repeats a repetition.
    """

    def __init__(self, *, pattern: str | None = None, column: str | None = None) -> None:
        self.pattern = pattern
        self.column = column
        self.needs_reference = pattern is None
        if pattern is not None:
            _compiled(pattern)

    def __call__(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[float | None]:
        """0 or 1."""
        found: list[float | None] = []
        for question, answer in zip(questions, answers, strict=True):
            pattern = _compiled(self.pattern if self.pattern is not None else self.expected(question).strip())
            text = answer.text.strip()
            found.append(float(len(text) <= LONGEST and pattern.fullmatch(text) is not None))
        return found

    def check(self, questions: Sequence[Question]) -> None:
        """Every row's pattern, where rows have them."""
        super().check(questions)
        if self.pattern is None:
            for question in questions:
                _compiled(self.expected(question).strip())


class JsonValid(Reward):
    """1 if the answer is one JSON value and fits a schema; else 0.

    Args:
        schema: A JSON schema (draft 2020-12), as a mapping; `null` = any value. Needs `jsonschema`.
        partial: What an answer is worth that is JSON and does not fit the schema.
    """

    def __init__(self, *, schema: dict[str, Any] | None = None, partial: float = 0.0) -> None:
        if not 0 <= partial <= 1:
            raise UserError(
                f"JsonValid with partial={partial}",
                why="it is a share of the reward of an answer that fits",
                fix="give a number in [0, 1]",
            )
        self.schema = schema
        self.partial = partial
        self._validator = None if schema is None else _validator(schema)

    def __call__(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[float | None]:
        """0, `partial` or 1."""
        return [self._one(answer.text) for answer in answers]

    def _one(self, text: str) -> float:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return 0.0
        if self._validator is None or self._validator.is_valid(value):
            return 1.0
        return self.partial


def _bare(text: str) -> str:
    return " ".join(text.casefold().split())


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        parsed = _parser.parse(pattern)
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"the pattern {pattern!r}: {error}",
            why="the reward Regex matches answers against it",
            fix="write it as Python's re does",
        ) from None
    if _repeats_a_repetition(parsed, inside=False):
        raise UserError(
            f"the pattern {pattern!r} repeats a repetition",
            why="matching it may take exponential time, and re has no time limit",
            fix="write it without, for example [a-z ]+ instead of ([a-z]+ ?)+",
        )
    return compiled


def _repeats_a_repetition(parsed: Iterable[Any], *, inside: bool) -> bool:
    for operator, argument in parsed:
        repeats = str(operator) in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") and argument[1] > 1
        if repeats and inside:
            return True
        for part in _inner(argument):
            if _repeats_a_repetition(part, inside=inside or repeats):
                return True
    return False


def _inner(argument: Any) -> list[Any]:
    """Sub-patterns in the argument of an operator, however deep it wraps them."""
    if isinstance(argument, _parser.SubPattern):
        return [argument]
    if isinstance(argument, tuple | list):
        return [part for each in argument for part in _inner(each)]
    return []


def _validator(schema: dict[str, Any]) -> Any:
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
    except ImportError:
        raise UserError(
            "JsonValid with a schema and no jsonschema",
            why="it checks an answer against the schema",
            fix='pip install "residency[text]", or set schema to null',
        ) from None
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise UserError(
            f"JsonValid with a schema that is none: {error.message}",
            why="an answer is checked against it",
            fix="correct the schema (JSON schema, draft 2020-12)",
        ) from None
    return Draft202012Validator(schema)
