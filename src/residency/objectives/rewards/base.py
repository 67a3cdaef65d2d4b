"""The contract of a reward: a pure function of a question and the answers to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from residency.core.errors import UserError
from residency.core.types import Capability
from residency.objectives.base import Learner

__all__ = ["Answer", "Question", "Reward"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What was asked.

    Args:
        prompt: Text of the prompt.
        reference: Text of the row's own completion; empty where it has none.
        row: Domain and id, for messages.
        extra: Other columns of the row.
        ids: Tokens of the prompt.
    """

    prompt: str
    reference: str
    row: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the policy wrote.

    Args:
        text: Decoded, without the end token.
        tokens: How many, the end token included.
        ended: Whether it ended by itself; otherwise it was cut off.
        ids: Its tokens, the end token included.
    """

    text: str
    tokens: int
    ended: bool
    ids: tuple[int, ...] = ()


class Reward(ABC):
    """Scores answers, higher is better. Pure: no clock, no network, no random number, and no model but one that the run
    itself has learnt.
    """

    lowest: float = 0.0
    """No reward is lower."""

    highest: float = 1.0
    """No reward is higher."""

    needs_reference: bool = False
    """Whether it compares with the row's own completion; rows without one are refused."""

    column: str | None = None
    """The column of a prompt's row that it compares with instead of a completion."""

    requires: frozenset[Capability] = frozenset()
    """What the adapter must provide."""

    def begin_stage(self, learner: Learner) -> None:
        """Before the first answer of a stage, also of one that goes on."""

    @abstractmethod
    def __call__(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[float | None]:
        """One number per answer.

        Args:
            questions: One per answer.
            answers: What was written.

        Returns:
            In `lowest ... highest`; `None` = cannot be scored, and takes part in no mean.
        """

    def parts(self, questions: Sequence[Question], answers: Sequence[Answer]) -> Mapping[str, list[float | None]]:
        """What it is made of, by name, for the log."""
        return {type(self).__name__: self(questions, answers)}

    def expected(self, question: Question) -> str:
        """The right answer: the row's completion, or what its `column` holds; empty where there is none."""
        return question.reference if self.column is None else str(question.extra.get(self.column, "")).strip()

    def check(self, questions: Sequence[Question]) -> None:
        """Refuse rows that it cannot judge, before any training.

        Raises:
            UserError: It compares with a completion or a column, and a row has none.
        """
        bare = next((q for q in questions if not self.expected(q).strip()), None) if self.needs_reference else None
        if bare is not None:
            name = type(self).__name__
            has = f"; its columns are {', '.join(sorted(bare.extra))}" if bare.extra else ""
            what = "completion" if self.column is None else f"column {self.column!r}"
            raise UserError(
                f"the reward {name} and row {bare.row} without a {what}{has}",
                why=f"it compares an answer with the row's {what}",
                fix=f"give every row a completion, name the column that has the right answer ({name}, column: ...), or "
                "choose a reward that needs none (JsonValid, Regex with a pattern)",
            )
