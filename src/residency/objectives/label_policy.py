"""On-policy learning without writing: a policy over the labels of a labelled domain, with exact gradients.

    π(k | x) = softmax_k of the labels' log-likelihoods,   J(x) = Σ_k π(k | x) r_k,   ∂J/∂ℓ_k = π(k) (r_k - J)

All labels are branches of one prompt, so that one pass gives every likelihood. Only likelihoods relative to one another
move; how much of all answers the labels have together is logged as `label_mass`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.randomness import seed_of
from residency.core.types import Batch, Branch, Example, Stage
from residency.objectives.answers import questions
from residency.objectives.base import ExampleLosses, Forward, Learner, Objective, Reads, refuse, target_nll
from residency.objectives.dataset import Mapped, branch_sums, branch_weights, own_rows
from residency.objectives.policy_losses import enumerated_return, leave_one_out
from residency.objectives.reference import reference_sums, with_reference
from residency.objectives.rewards.base import Answer, Reward

__all__ = ["LabelPolicy"]

MOST_LABELS = 64


class LabelPolicy(Objective):
    """Maximise the expected reward of answering with one of the domain's labels.

    Args:
        reward: What a label is worth as the answer to a prompt.
        group: Labels drawn per prompt and step, for RLOO; `null` = all labels, weighted by their probability, which has
            no sampling noise.
        beta: Weight of KL(policy ‖ policy at the start of the stage) over the labels; 0 = none.
    """

    reads: ClassVar[Reads] = "label"
    shardable = True
    forward_noise: ClassVar[bool] = False

    def __init__(self, *, reward: Reward, group: int | None = None, beta: float = 0.0) -> None:
        if beta < 0 or (group is not None and group < 2):
            raise refuse(
                self,
                f"group={group}, beta={beta}",
                why="a draw is compared with others of its group, and a divergence is to be small",
                fix="give group: null (exact), or 2 and more, and beta: 0.0",
            )
        self.reward = reward
        self.requires = reward.requires
        self.group = group
        self.beta = beta
        self._draws: dict[int, Tensor] = {}

    def units(self, example: Example) -> float:
        """One: a prompt."""
        return 1.0

    def begin_stage(self, learner: Learner, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """Give every row of the stage's domain all labels as branches, each weighted by its reward."""
        own = own_rows(dataset, stage.domain)
        labels = list(dict.fromkeys(e.completion for e in own))
        if not 2 <= len(labels) <= min(MOST_LABELS, max(2, len(own) // 2)):
            raise UserError(
                f"LabelPolicy on {stage.domain}, whose {len(own)} rows have {len(labels)} completions",
                why=f"it sums over every label, and only completions that repeat are labels (2 to {MOST_LABELS})",
                fix="use RLOO or GRPO, which write their answers",
            )
        asked = questions(learner, own)
        self.reward.begin_stage(learner)
        self.reward.check(asked)
        texts = [
            q.reference for q in questions(learner, [replace(own[0], branches=(Branch(tokens=t),)) for t in labels])
        ]
        answers = [Answer(text=t, tokens=len(ids), ended=True, ids=ids) for t, ids in zip(texts, labels, strict=True)]
        table = {}
        for example, question in zip(own, asked, strict=True):
            worth = self.reward([question] * len(labels), answers)
            pairs = [(ids, value) for ids, value in zip(labels, worth, strict=True) if value is not None]
            branches = tuple(Branch(tokens=ids, role="rollout", weight=value) for ids, value in pairs)
            table[example] = replace(example, branches=branches)
        return with_reference(learner, self, Mapped(dataset, lambda e: table.get(e, e)), when="now")

    def prepare(self, learner: Learner, batch: Batch) -> Batch:
        """The numbers that decide the draws of a step, slot by slot."""
        if self.group is not None:
            stage, step = learner.stage, learner.global_step
            self._draws = {}
            for slot in batch.whole.slots:
                words = [("label", stage.index, step, slot, copy) for copy in range(self.group)]
                numbers = [seed_of(stage.seed, *each) / 2**63 for each in words]
                self._draws[slot] = torch.tensor(numbers, dtype=torch.float64)
        return batch

    def losses(self, forward: Forward, batch: Batch, reference: Forward | None) -> ExampleLosses:
        """-J (or RLOO's estimate of its gradient) + β KL of each prompt."""
        nll, logits = target_nll(forward, batch)
        rewards, there = branch_weights(batch), branch_sums(torch.ones_like(nll), batch) > 0
        likelihood = torch.where(there, -branch_sums(nll, batch), -torch.inf)
        value, policy = enumerated_return(likelihood, rewards)
        values = -value
        if self.group is not None and batch.part_of is not None:
            values = self._sampled(likelihood, policy.detach(), rewards, batch)
        known = reference_sums(batch, None)
        log = {"reward": value.detach().mean(), "label_mass": likelihood.detach().logsumexp(-1).exp().mean()}
        if known is not None:
            kl = _divergence(likelihood, torch.where(there, known, -torch.inf))
            log["kl"] = kl.detach().mean()
            values = values + self.beta * kl if self.beta else values
        return ExampleLosses(values=values, logits=logits, log=log)

    def _sampled(self, likelihood: Tensor, policy: Tensor, rewards: Tensor, batch: Batch) -> Tensor:
        """-1/G Σ A log π(label) over G drawn labels."""
        numbers = torch.stack([self._draws[slot] for slot in batch.whole.slots]).to(policy.device)
        cumulated = policy.double().cumsum(-1)
        drawn = torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True).clamp_(max=policy.shape[1] - 1)
        advantages = leave_one_out(rewards.gather(1, drawn))
        return -(advantages * likelihood.log_softmax(-1).gather(1, drawn)).mean(-1)


def _divergence(likelihood: Tensor, start: Tensor) -> Tensor:
    """(B,) KL(policy ‖ start) over the labels."""
    ours, theirs = likelihood.log_softmax(-1), start.log_softmax(-1)
    return torch.where(ours.isinf(), 0.0, ours.exp() * (ours - theirs)).nan_to_num(0.0).sum(-1)
