"""A score as a reward: what a domain is judged by is what is learnt."""

from __future__ import annotations

from collections.abc import Sequence

from residency.core.errors import UserError
from residency.core.types import Row
from residency.objectives.rewards.base import Answer, Question, Reward
from residency.scorers.base import Answer as Scored
from residency.scorers.base import Scorer
from residency.scorers.find import find_scorer

__all__ = ["ByScorer"]


class ByScorer(Reward):
    """What a scorer of texts gives the answer; of one where lower is better, its negative.

    Args:
        scorer: Short name, class path or scorer (`residency.scorers`) that reads generated texts.
        column: Of rows that are prompts alone: the column with the right answer; `null` = the completion.

    Raises:
        UserError: The scorer reads likelihoods, or judges no single answer.
    """

    def __init__(self, *, scorer: str | Scorer, column: str | None = None) -> None:
        self.scorer = find_scorer(scorer, where="the reward ByScorer")
        self.column = column
        if self.scorer.needs != "generation":
            raise UserError(
                f"the reward ByScorer with the scorer {self.scorer.name}",
                why="it reads likelihoods, and a reward judges what was written",
                fix="choose a scorer of texts, such as exact_match, rougeL, numeric or json_valid",
            )
        if self.scorer.whole_column:
            raise UserError(
                f"the reward ByScorer with the scorer {self.scorer.name}",
                why="it judges a whole column of answers, and a reward judges one",
                fix="choose its form for one text, such as bleu or chrf",
            )
        self.needs_reference = self.scorer.compares
        self.lowest, self.highest = (0.0, 1.0) if self.scorer.higher_is_better else (-1.0, 0.0)

    def __call__(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[float | None]:
        """The scores."""
        sign = 1.0 if self.scorer.higher_is_better else -1.0
        texts = [Scored(text=a.text.strip(), tokens=a.tokens, ended=a.ended) for a in answers]
        return [sign * float(score) for score in self.scorer([self._row(q) for q in questions], texts)]

    def check(self, questions: Sequence[Question]) -> None:
        """As the scorer does."""
        super().check(questions)
        self.scorer.check([self._row(question) for question in questions])

    def _row(self, question: Question) -> Row:
        expected = self.expected(question)
        return Row(id=question.row, prompt=question.prompt, completion=expected, extra=question.extra)
