"""Scores of pairs of answers: which of the two the model finds likelier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from residency.core.errors import UserError
from residency.core.types import Row
from residency.scorers.base import Answer, LabelScore, Scorer

__all__ = ["PreferenceAccuracy"]


@dataclass(frozen=True, kw_only=True)
class PreferenceAccuracy(Scorer):
    """Whether the chosen answer of a pair is likelier than the rejected one, without a reference model; a tie is 1/2.

    Args:
        by: `sum`: log-likelihoods of whole answers, end token included, which favours short ones; `tokens`: their means
            per token.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "preference_accuracy": {"by": "sum"},
        "preference_accuracy_norm": {"by": "tokens"},
    }
    unit: ClassVar[str] = "share of pairs whose chosen answer is the likelier one"
    needs: ClassVar[Literal["likelihood"]] = "likelihood"
    labels: ClassVar[Literal["all"]] = "all"

    by: Literal["sum", "tokens"] = "sum"

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0, 1/2 or 1."""
        found = []
        for row, answer in zip(rows, answers, strict=True):
            chosen, rejected = (self._nll(answer.labels[text]) for text in (row.completion, row.rejected))
            found.append(0.5 if chosen == rejected else float(chosen < rejected))
        return found

    def _nll(self, answer: LabelScore) -> float:
        return answer.nll if self.by == "sum" else answer.nll / answer.tokens

    def check(self, rows: Sequence[Row]) -> None:
        """Every row is a pair.

        Raises:
            UserError: Naming a row that is none.
        """
        single = next((row for row in rows if row.kind != "pair"), None)
        if single is not None:
            raise UserError(
                f"scorers has {self.name!r}, and row {single.id!r} is no pair",
                why="it compares a chosen answer with a rejected one",
                fix='give rows with "prompt", "chosen" and "rejected", or another scorer',
            )
