"""Rewards made of others, and of the length alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from residency.core.errors import UserError
from residency.objectives.base import Learner
from residency.objectives.policy_losses import soft_overlong
from residency.objectives.rewards.base import Answer, Question, Reward

__all__ = ["LengthPenalty", "Sum"]


class LengthPenalty(Reward):
    """0 for short answers, down to -1 for long ones (DAPO's soft overlong punishment, Yu et al. 2025, eq. 13).

    Args:
        longest: L, tokens of an answer, the end token included; beyond it -1.
        cushion: C: from L - C on the penalty grows linearly.
    """

    lowest = -1.0
    highest = 0.0

    def __init__(self, *, longest: int, cushion: int) -> None:
        if not 0 < cushion <= longest:
            raise UserError(
                f"LengthPenalty with longest={longest}, cushion={cushion}",
                why="the penalty grows over the last `cushion` tokens of `longest`",
                fix="choose 0 < cushion <= longest",
            )
        self.longest = longest
        self.cushion = cushion

    def __call__(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[float | None]:
        """-1 to 0."""
        return [soft_overlong(a.tokens, longest=self.longest, cushion=self.cushion) for a in answers]


class Sum(Reward):
    """Σ weight · reward; summed before any advantage is taken. Each part is logged alone.

    Args:
        rewards: By name.
        weights: By the same names; 1 where none is given.
    """

    def __init__(self, *, rewards: dict[str, Reward], weights: dict[str, float] | None = None) -> None:
        unknown = sorted({*(weights or {})} - {*rewards})
        if not rewards or unknown:
            raise UserError(
                f"Sum of the rewards {sorted(rewards)} with weights for {unknown or 'none'}",
                why="at least one reward is summed, and a weight belongs to one of them",
                fix="name the weights as the rewards are named",
            )
        self.rewards = dict(rewards)
        self.weights = {name: (weights or {}).get(name, 1.0) for name in rewards}
        ends = [(w * r.lowest, w * r.highest) for w, r in ((self.weights[n], r) for n, r in self.rewards.items())]
        self.lowest, self.highest = sum(min(e) for e in ends), sum(max(e) for e in ends)
        self.needs_reference = any(reward.needs_reference for reward in rewards.values())
        self.requires = frozenset().union(*(reward.requires for reward in rewards.values()))

    def begin_stage(self, learner: Learner) -> None:
        """As each of them does."""
        for reward in self.rewards.values():
            reward.begin_stage(learner)

    def __call__(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[float | None]:
        """`None` where a part is."""
        columns = [(self.weights[name], reward(questions, answers)) for name, reward in self.rewards.items()]
        total: list[float | None] = []
        for i in range(len(answers)):
            values = [(weight, column[i]) for weight, column in columns]
            known = [weight * value for weight, value in values if value is not None]
            total.append(sum(known) if len(known) == len(values) else None)
        return total

    def parts(self, questions: Sequence[Question], answers: Sequence[Answer]) -> Mapping[str, list[float | None]]:
        """Each reward by its name, without its weight."""
        return {name: reward(questions, answers) for name, reward in self.rewards.items()}

    def check(self, questions: Sequence[Question]) -> None:
        """As each of them does."""
        for reward in self.rewards.values():
            reward.check(questions)
