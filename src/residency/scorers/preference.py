"""Scores of pairs of answers: which of the two the model finds likelier, or worth more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from residency.core.errors import UserError
from residency.core.types import Row
from residency.scorers.base import Answer, LabelScore, Scorer

__all__ = ["PreferenceAccuracy", "RewardAccuracy"]


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
        _check_pairs(rows, self.name)


@dataclass(frozen=True, kw_only=True)
class RewardAccuracy(Scorer):
    """What a reward model (objective `RewardModel`) makes of a pair: the logit of the end token behind each answer.

    Args:
        measure: `accuracy`: whether the chosen answer is worth more, a tie is 1/2; `margin`: by how many log-odds.
        token: As `RewardModel.token`.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reward_accuracy": {"measure": "accuracy"},
        "reward_margin": {"measure": "margin"},
    }
    unit: ClassVar[str] = "chosen answer worth more than the rejected one: share of pairs, or log-odds"
    needs: ClassVar[Literal["likelihood"]] = "likelihood"
    rewards: ClassVar[bool] = True

    measure: Literal["accuracy", "margin"] = "accuracy"
    token: str | None = None

    @property
    def name(self) -> str:
        """By what is measured, whichever the token."""
        return f"reward_{self.measure}"

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0, 1/2 or 1; or differences."""
        differences = [chosen - rejected for chosen, rejected in (answer.rewards[self.token] for answer in answers)]
        if self.measure == "margin":
            return differences
        return [0.5 if d == 0 else float(d > 0) for d in differences]

    def check(self, rows: Sequence[Row]) -> None:
        """Every row is a pair."""
        _check_pairs(rows, self.name)


def _check_pairs(rows: Sequence[Row], scorer: str) -> None:
    single = next((row for row in rows if row.kind != "pair"), None)
    if single is not None:
        raise UserError(
            f"scorers has {scorer!r}, and row {single.id!r} is no pair",
            why="it compares a chosen answer with a rejected one",
            fix='give rows with "prompt", "chosen" and "rejected", or another scorer',
        )
