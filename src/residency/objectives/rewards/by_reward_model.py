"""A reward model that an earlier stage has learnt, as the reward of a later one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from residency.core.batching import by_token_budget, make_batch
from residency.core.errors import UserError
from residency.core.types import Branch, Example, Tensors
from residency.objectives.base import Learner
from residency.objectives.reward_model import asked_behind, branch_rewards, reward_token
from residency.objectives.rewards.base import Answer, Question, Reward

__all__ = ["ByRewardModel"]

PASS_TOKENS = 2048  # without gradients memory is no question


class ByRewardModel(Reward):
    """What the model as it was after an earlier stage (objective `RewardModel`) gives the answer.

    The weights of that stage take the place of the policy's for one pass: there is no second model. So the adapter must
    keep its coordinates over the stages.

    Args:
        stage: Which stage of this run, from 1.
        token: As its `RewardModel.token`.

    Raises:
        UserError: There is no such stage, or not yet.
    """

    lowest = -math.inf
    highest = math.inf
    requires = frozenset({"fixed_coordinates"})

    def __init__(self, *, stage: int, token: str | None = None) -> None:
        if stage < 1:
            raise UserError(
                f"the reward ByRewardModel with stage={stage}",
                why="stages are counted from 1, and it was learnt in one of them",
                fix="give the number of the stage whose objective is RewardModel",
            )
        self.stage = stage
        self.token = token
        self._learner: Learner | None = None
        self._weights: Tensors = {}

    def begin_stage(self, learner: Learner) -> None:
        """Take the weights that the earlier stage left."""
        if self.stage > learner.stage.index:
            raise UserError(
                f"the reward ByRewardModel with stage={self.stage}, asked for by stage {learner.stage.index + 1} "
                f"({learner.stage.domain})",
                why="a reward model is learnt before what learns from it",
                fix="name an earlier stage, or move the domain of the reward model forward in data.order",
            )
        self._learner, self._weights = learner, learner.weights_after(self.stage)

    def __call__(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[float | None]:
        """Logits, whose differences are log-odds."""
        learner = self._learner
        if learner is None:
            raise UserError(
                "the reward ByRewardModel outside of a stage",
                why="it is a model that an earlier stage of the run has learnt",
                fix="use it as the reward of an objective, behind a stage that learns a RewardModel",
            )
        token = reward_token(learner.backbone.tokenizer, self.token)
        asked = [asked_behind(e, token) for e in _examples(questions, answers)]
        order = sorted(range(len(asked)), key=lambda i: (len(asked[i]), i))
        found: dict[int, list[float]] = {}
        places = iter(order)
        with learner.as_it_was(self._weights):
            for group in by_token_budget([asked[i] for i in order], tokens=PASS_TOKENS):
                batch = make_batch(group, layout=learner.layout).to(learner.device)
                rows = branch_rewards(learner.forward(batch), batch).tolist()
                for example, row in zip(group, rows, strict=True):
                    found[next(places)] = row[: len(example.branches)]
        return [value for i in range(len(asked)) for value in found[i]]


def _examples(questions: Sequence[Question], answers: Sequence[Answer]) -> list[Example]:
    """Answers to one question side by side behind its prompt, which is read once."""
    pairs = zip(questions, answers, strict=True)
    found = []
    for _, group in groupby(pairs, key=lambda pair: (pair[0].row, pair[0].ids)):
        together = list(group)
        branches = tuple(Branch(tokens=answer.ids, role="rollout") for _, answer in together)
        question = together[0][0]
        found.append(Example(domain="", row=question.row, prompt=question.ids, branches=branches))
    return found
