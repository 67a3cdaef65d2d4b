"""Scores of one exact form: the whole answer, a number, an option's letter, a pattern."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar, Literal

from residency.core.errors import UserError
from residency.core.types import Row
from residency.scorers.base import Answer, Scorer, references

__all__ = ["Choice", "ExactMatch", "Numeric", "Regex", "exact_match", "last_number", "same_number"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A sign counts at the start, after a blank, after "(" and after "="; else it is a hyphen ("x-1" ends in 1).
_NUMBER = re.compile(
    r"(?:(?:^|(?<=[\s(=$€£]))[-+\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)\.\d+|(?<!\d)\.\d+)?"
    r"(?:[eE][-+]?\d+)?(?:\s*/\s*\d+(?![\d.]))?%?"
)


def exact_match(prediction: str, target: str) -> float:
    """1 if both are equal up to white space, else 0; a part of the answer is no answer."""
    return float(prediction.split() == target.split())


@dataclass(frozen=True, kw_only=True)
class ExactMatch(Scorer):
    """Whether the answer is the completion, up to white space; "4" is not "42".

    Args:
        normalise: `white_space`; `case`: case folded too; `olora`: lower case, all punctuation removed, as the code
            of O-LoRA and SAPT does it. Never the last for numbers: "17.48" would equal "1748".
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "exact_match": {"normalise": "white_space"},
        "exact_match_case": {"normalise": "case"},
        "exact_match_olora": {"normalise": "olora"},
    }
    unit: ClassVar[str] = "share of rows written exactly"
    needs: ClassVar[Literal["generation"]] = "generation"

    normalise: Literal["white_space", "case", "olora"] = "white_space"

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 or 1."""
        return [
            max(exact_match(self._normal(answer.text or ""), self._normal(text)) for text in references(row))
            for row, answer in zip(rows, answers, strict=True)
        ]

    def _normal(self, text: str) -> str:
        if self.normalise == "olora":
            return text.lower().translate(_PUNCTUATION)
        return text.casefold() if self.normalise == "case" else text


def last_number(text: str, *, after: str = "") -> Decimal | None:
    """The last number of a text, or of what follows the last `after` if that is there; `None` without one.

    Thousands commas, percents (divided by 100), fractions `a/b` and exponents are read.

    >>> last_number("so 3 + 1 = 4"), last_number("1,000"), last_number("x-1"), last_number("3/4")
    (Decimal('4'), Decimal('1000'), Decimal('1'), Decimal('0.75'))
    """
    if after and after in text:
        text = text.rpartition(after)[2]
    found = [match[0] for match in _NUMBER.finditer(text) if any(c.isdigit() for c in match[0])]
    return _value(found[-1]) if found else None


def _value(written: str) -> Decimal | None:
    plain = written.replace(",", "").replace("\u2212", "-").replace(" ", "")
    percent = plain.endswith("%")
    top, _, bottom = plain.rstrip("%").partition("/")
    try:
        value = Decimal(top) / (Decimal(bottom) if bottom else 1)
    except (InvalidOperation, ZeroDivisionError):
        return None
    return value / 100 if percent else value


def same_number(answer: Decimal | None, reference: Decimal, *, relative: float = 1e-6) -> bool:
    """Whether a number is the reference: relatively to 1e-6, or rounded to the decimals that the reference has."""
    if answer is None or not answer.is_finite() or not reference.is_finite():
        return False
    if abs(answer - reference) <= Decimal(repr(relative)) * abs(reference):
        return True
    exponent = reference.as_tuple().exponent
    try:
        rounded = isinstance(exponent, int) and exponent < 0 and answer.quantize(Decimal((0, (1,), exponent)))
    except InvalidOperation:
        return False
    return rounded == reference


@dataclass(frozen=True, kw_only=True)
class Numeric(Scorer):
    """Whether the last number of the answer is that of the completion.

    Args:
        after: Where an answer has this text, only what follows its last occurrence is read ("Answer:", "####").
        relative: Largest relative error; an answer that rounds to the completion's own decimals is right too.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"numeric": {}}
    unit: ClassVar[str] = "share of rows whose last number is right"
    needs: ClassVar[Literal["generation"]] = "generation"

    after: str = "Answer:"
    relative: float = 1e-6

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 or 1."""
        return [float(self._right(row, answer)) for row, answer in zip(rows, answers, strict=True)]

    def _right(self, row: Row, answer: Answer) -> bool:
        written = last_number(answer.text or "", after=self.after)
        wanted = [last_number(text, after=self.after) for text in references(row)]
        return any(same_number(written, number, relative=self.relative) for number in wanted if number is not None)

    def check(self, rows: Sequence[Row]) -> None:
        """Every completion has a number.

        Raises:
            UserError: Naming a row that has none.
        """
        without = [row.id for row in rows if last_number(row.completion, after=self.after) is None]
        if without:
            raise UserError(
                f"{len(without)} completions without a number, e.g. row {without[0]!r}",
                why="the scorer `numeric` compares numbers",
                fix="use exact_match for this domain, or give every completion its number",
            )


@dataclass(frozen=True, kw_only=True)
class Choice(Scorer):
    """Whether the first line of the answer begins with the completion's letter: "A because" is A, "Apple" is none.

    Args:
        letters: The options.
        after: Where an answer has this text, what follows its first occurrence is read (ScienceQA: "Answer: ").
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"choice": {}}
    unit: ClassVar[str] = "share of rows whose option is right"
    needs: ClassVar[Literal["generation"]] = "generation"

    letters: str = "ABCDEFGHIJ"
    after: str = "Answer: "

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 or 1."""
        found = []
        for row, answer in zip(rows, answers, strict=True):
            written = self.letter(answer.text or "")
            found.append(float(written is not None and written in {self.letter(text) for text in references(row)}))
        return found

    def letter(self, text: str) -> str | None:
        """The option that a text names, if it names one."""
        if self.after in text:
            text = text.partition(self.after)[2]
        match = re.match(r"\W*([^\W\d_])\b", text.lstrip().partition("\n")[0])
        return match[1] if match and match[1] in self.letters else None


@dataclass(frozen=True, kw_only=True)
class Regex(Scorer):
    """Whether the answer matches a pattern; with `capture`, whether what it captures is what the completion captures.

    Args:
        pattern: Of Python's `re`, searched for in the answer; `.` does not match a newline.
        full: The whole answer has to match.
        capture: Compare the first group, or the whole match without one, with that of the completion.
        label: Name of the score, where a domain has several patterns.

    Raises:
        UserError: The pattern is none.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    unit: ClassVar[str] = "share of rows that match the pattern"
    needs: ClassVar[Literal["generation"]] = "generation"

    pattern: str
    full: bool = False
    capture: bool = False
    label: str = "regex"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(
                f"pattern {self.pattern!r}: {error}",
                why="the scorer `Regex` searches for it",
                fix="correct the regular expression; in YAML put it in single quotes",
            ) from error

    @property
    def name(self) -> str:
        """The label."""
        return self.label

    @property
    def compares(self) -> bool:
        """What is captured."""
        return self.capture

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 or 1."""
        return [float(self._right(row, answer.text or "")) for row, answer in zip(rows, answers, strict=True)]

    def _right(self, row: Row, text: str) -> bool:
        written = self._found(text)
        if not self.capture or written is None:
            return written is not None
        return written in {self._found(reference) for reference in references(row)}

    def _found(self, text: str) -> str | None:
        find = re.fullmatch if self.full else re.search
        match = find(self.pattern, text)
        return None if match is None else match[1] if match.re.groups else match[0]
