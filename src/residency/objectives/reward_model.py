"""A reward model on the backbone's own head: how good an answer is, read off the logit of one token behind its end.

    r(x, y) = logit of the token after (x, y) and its end token,      loss = -log σ(r_c - r_r - m) + c (r_c + r_r)²

The position behind the end of a text is trained by nobody, so its row of the head is free to mean something: no new
parameter, nothing that comes neither from files nor from the seed, and every adapter, layout, mitigation and export
works as it does for likelihoods.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.types import Batch, Branch, Example, Stage
from residency.objectives.base import ExampleLosses, Forward, Learner, Objective, Reads, refuse
from residency.objectives.dataset import Mapped, branch_sums
from residency.objectives.pair_losses import ties_half
from residency.objectives.preference import check_pairs
from residency.objectives.reward_losses import bradley_terry, centring

__all__ = ["RewardModel", "asked_behind", "branch_rewards", "reward_token"]


class RewardModel(Objective):
    """The chosen answer is worth more than the rejected one (Bradley and Terry 1952), for rows with `prompt`, `chosen`,
    `rejected` and, where they have one, a `margin`. Dropout is off.

    A later stage learns from it by `residency.objectives.rewards.ByRewardModel`; the scorers `reward_accuracy` and
    `reward_margin` judge it.

    Args:
        centring: Weight c of (r_c + r_r)², which keeps the scale of rewards from drifting; 0.01 is usual, 0 = off.
        token: Whose logit is the reward, as the tokenizer spells it; `null` = the end token.

    Raises:
        UserError: The weight is negative or no number.
    """

    reads: ClassVar[Reads] = "pair"
    shardable = True
    forward_noise: ClassVar[bool] = False
    uses_logits = True
    not_on_classifiers = "it reads a token of the vocabulary behind an answer, and a classifier reads prompts alone"

    def __init__(self, *, centring: float = 0.0, token: str | None = None) -> None:
        if not 0 <= centring < math.inf:
            raise refuse(
                self, f"centring={centring}", why="it is the weight of a penalty", fix="give 0 (off) or about 0.01"
            )
        self.centring = centring
        self.token = token

    def units(self, example: Example) -> float:
        """One: a pair."""
        return 1.0

    def begin_stage(self, learner: Learner, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """Ask behind the end of every answer.

        Raises:
            UserError: A row is no pair, or the head has nothing at the token, so that nothing can be learnt there.
        """
        check_pairs(self, dataset, stage)
        token = reward_token(learner.backbone.tokenizer, self.token)
        asked = Mapped(dataset, lambda example: asked_behind(example, token))
        with learner.as_it_was("now"):
            batch = self.collate([asked[0]], layout=learner.layout).to(learner.device)
            if not bool(branch_rewards(learner.forward(batch), batch).any()):
                raise refuse(
                    self,
                    f"token {learner.backbone.tokenizer.convert_ids_to_tokens(token)!r}, whose logits are 0",
                    why="the model's head has a row of zeros for it (a padding token), which has no gradient",
                    fix="give another token that answers do not need, the same to scorers and ByRewardModel",
                )
        return asked

    def losses(self, forward: Forward, batch: Batch, reference: Forward | None) -> ExampleLosses:
        """The loss of each pair."""
        logits = forward(batch)
        rewards = branch_rewards(logits, batch)
        chosen, rejected = rewards[:, 0], rewards[:, 1]
        margins = [float(e.extra.get("margin", 0.0)) for e in batch.examples]
        values = bradley_terry(chosen, rejected, torch.tensor(margins, device=rewards.device))
        if self.centring:
            values = values + self.centring * centring(chosen, rejected)
        weights = torch.tensor([e.branches[0].weight for e in batch.examples], device=rewards.device)
        difference, own = (chosen - rejected).detach(), rewards.detach()
        log = {
            "rewards/chosen": own[:, 0].mean(),
            "rewards/rejected": own[:, 1].mean(),
            "rewards/margins": difference.mean(),
            "rewards/accuracies": ties_half(difference).mean(),
            "rewards/min": own.min(),
            "rewards/max": own.max(),
        }
        return ExampleLosses(values=weights * values, logits=logits, log=log)


def reward_token(tokenizer: Any, token: str | None) -> int:
    """The id of the token whose logit is the reward.

    Args:
        tokenizer: Of the backbone.
        token: As it spells it; `None` = the end token.

    Raises:
        UserError: It is no token.
    """
    if token is None:
        return int(tokenizer.eos_token_id)
    if token not in tokenizer.get_vocab():
        raise UserError(
            f"the reward token {token!r}",
            why="the tokenizer has no such token, and a reward is the logit of one",
            fix="leave it out to take the end token, or spell a token as tokenizer.json does",
        )
    return int(tokenizer.convert_tokens_to_ids(token))


def asked_behind(example: Example, token: int) -> Example:
    """The same answers, each asked for one token more and supervised there alone; what is so already stays.

    Args:
        example: A prompt and answers.
        token: Whose logit is the reward.
    """
    return replace(example, branches=tuple(_asked(branch, token) for branch in example.branches))


def _asked(branch: Branch, token: int) -> Branch:
    length = len(branch.tokens)
    if branch.mask and branch.supervised == (length - 1,) and branch.tokens[-1] == token:
        return branch
    return replace(branch, tokens=(*branch.tokens, token), mask=(*[False] * length, True))


def branch_rewards(logits: Tensor, batch: Batch) -> Tensor:
    """(B, K) rewards of each branch, float32.

    Args:
        logits: (M, V) at the one supervised position of each branch.
        batch: Of examples as `asked_behind` makes them.
    """
    return branch_sums(logits.gather(-1, batch.targets[:, None]).squeeze(-1).float(), batch)
