"""On-policy learning by groups of answers: RLOO and GRPO with its published variants.

Every step the policy answers the prompts of the whole global batch, rewards are turned into advantages within each
group, and the gradient is that of the clipped surrogate. The value of the loss says nothing at a ratio of 1: watch
`reward` and `groups/informative`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from residency.core.types import Batch, Capability, Example, Stage
from residency.objectives.base import ExampleLosses, Forward, Learner, Objective, Reads, refuse
from residency.objectives.dataset import branch_sums, branch_weights, example_sums
from residency.objectives.group import GroupWriter, Truncated
from residency.objectives.policy_losses import (
    Aggregate,
    Scale,
    answer_weights,
    clipped_surrogate,
    group_advantages,
    kl_penalty,
    leave_one_out,
)
from residency.objectives.rewards.base import Reward
from residency.objectives.sft import weighted

__all__ = ["GRPO", "RLOO"]


class RLOO(Objective):
    """REINFORCE with the mean of the other answers as the baseline (Ahmadian et al. 2024): unbiased.

    The ratio is that of whole answers, the mean is over answers, and a divergence from the reference is taken off the
    reward before the baseline (k1, summed over the answer), as TRL does.

    Args:
        reward: What an answer is worth.
        group: Answers per prompt, at least 2.
        max_new_tokens: Most tokens of an answer.
        temperature: Of sampling, and of every log-probability.
        beta: Weight of the divergence, 0 = none.
        reference: `stage_start` (with beta > 0 a copy of what trains), or `pretrained`.
        clip: ε of the surrogate; idle with one update per rollout.
        updates: Optimizer steps per rollout; with more, the batches that would have followed are left out.
        truncated: An answer that was cut off: `zero` = worth at most 0; `mask` = not learnt from and not counted;
            `as_is`.
        informative: A stage does not start where fewer groups (a share, of 32 prompts) have unequal rewards; 0 = off.
    """

    reads: ClassVar[Reads] = "prompt"
    shardable = True
    forward_noise: ClassVar[bool] = False
    decoder_only = "what the policy has written so far is read behind the prompt, as one text"
    not_on_classifiers = "it lets the model write, and a classifier writes nothing"

    def __init__(
        self,
        *,
        reward: Reward,
        group: int = 8,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        beta: float = 0.0,
        reference: Literal["stage_start", "pretrained"] = "stage_start",
        clip: float = 0.2,
        updates: int = 1,
        truncated: Truncated = "zero",
        informative: float = 0.05,
    ) -> None:
        self.writer = GroupWriter(
            owner="RLOO",
            reward=reward,
            group=group,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            beta=beta,
            reference=reference,
            updates=updates,
            truncated=truncated,
            informative=informative,
            advantages=leave_one_out,
            kl_in_reward=True,
        )
        if not clip > 0:
            raise refuse(self, f"clip={clip}", why="it is how far a ratio may be from 1", fix="give clip: 0.2")
        self.clip = clip
        needs: frozenset[Capability] = frozenset({"reference"} if beta > 0 and reference == "pretrained" else ())
        self.requires = needs | reward.requires
        self.keeps_start = beta > 0 and reference == "stage_start"
        self.uses_logits = temperature != 1

    def units(self, example: Example) -> float:
        """Answers that are learnt from."""
        return self.writer.answers(example)

    def begin_stage(self, learner: Learner, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """See `GroupWriter.begin_stage`."""
        return self.writer.begin_stage(learner, dataset, stage)

    def prepare(self, learner: Learner, batch: Batch) -> Batch:
        """Answers in the place of the examples' own completions."""
        return self.writer.prepare(learner, batch)

    def judged(self, learner: Learner, examples: Sequence[Example]) -> list[Example]:
        """Each prompt with one answer of the policy as it is."""
        return self.writer.judged(learner, examples)

    def losses(self, forward: Forward, batch: Batch, reference: Forward | None) -> ExampleLosses:
        """Σ over answers of -min(ϱ A, clip(ϱ) A), ϱ of the whole answer; of other examples their likelihood."""
        nll, logits = self.writer.nll(forward, batch)
        if not self.writer.wrote(batch):
            return weighted(nll, None, batch, logits)
        log_p = -nll
        lengths = branch_sums(torch.ones_like(log_p), batch)
        log_ratio = branch_sums(log_p - self.writer.old(batch, log_p), batch)
        clips = {"clip_low": self.clip, "clip_high": self.clip}
        found, clipped = clipped_surrogate(log_ratio, branch_weights(batch), **clips)
        values = torch.where(lengths > 0, found, 0.0).sum(-1)
        log = {**self.writer.log(batch), "policy/entropy": nll.detach().mean()}
        log["clip/fraction"] = clipped.float().sum() / (lengths > 0).sum().clamp_min(1)
        return ExampleLosses(values=values, logits=logits, log=log)

    def state_dict(self) -> dict[str, Tensor]:
        """The answers of an unfinished rollout."""
        return self.writer.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse."""
        self.writer.load_state_dict(state)


class GRPO(Objective):
    """Group relative policy optimisation (Shao et al. 2024), with what was published since as arguments.

    Dr. GRPO (Liu et al. 2025): `scale: none`, `aggregate: constant`. DAPO (Yu et al. 2025): `aggregate: tokens`,
    `clip_high: 0.28`. As first published: `aggregate: sequences`.

    Args:
        reward: What an answer is worth.
        group: Answers per prompt, at least 2.
        max_new_tokens: Most tokens of an answer.
        temperature: Of sampling, and of every log-probability.
        scale: What advantages are divided by: the standard deviation of the `group`, of the `batch`, or `none`.
        aggregate: What the loss is a mean of: `tokens` of the step, `sequences` (means over each), or `constant` (as if
            every answer had max_new_tokens).
        clip_low: ε below 1; idle with one update per rollout.
        clip_high: ε above 1.
        beta: Weight of the divergence from the reference, 0 = none.
        kl: `k3_ratio` (k3 times the ratio: the gradient of KL(policy ‖ reference)), `k3` (as first published: that of
            the other direction), `k2`.
        reference: `stage_start` (with beta > 0 a copy of what trains), or `pretrained`.
        updates: Optimizer steps per rollout; with more, the batches that would have followed are left out.
        truncated: An answer that was cut off: `zero` = worth at most 0; `mask` = not learnt from and not counted;
            `as_is`.
        informative: A stage does not start where fewer groups (a share, of 32 prompts) have unequal rewards; 0 = off.
    """

    reads: ClassVar[Reads] = "prompt"
    shardable = True
    forward_noise: ClassVar[bool] = False
    decoder_only = "what the policy has written so far is read behind the prompt, as one text"
    not_on_classifiers = "it lets the model write, and a classifier writes nothing"

    def __init__(
        self,
        *,
        reward: Reward,
        group: int = 8,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        scale: Scale = "group",
        aggregate: Aggregate = "tokens",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        beta: float = 0.0,
        kl: Literal["k3_ratio", "k3", "k2"] = "k3_ratio",
        reference: Literal["stage_start", "pretrained"] = "stage_start",
        updates: int = 1,
        truncated: Truncated = "zero",
        informative: float = 0.05,
    ) -> None:
        self.writer = GroupWriter(
            owner="GRPO",
            reward=reward,
            group=group,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            beta=beta,
            reference=reference,
            updates=updates,
            truncated=truncated,
            informative=informative,
            advantages=lambda rewards: group_advantages(rewards, scale=scale),
            kl_in_reward=False,
        )
        if not (0 < clip_low <= 1 and clip_high > 0):
            raise refuse(
                self,
                f"clip_low={clip_low}, clip_high={clip_high}",
                why="a ratio is kept within 1 - clip_low and 1 + clip_high",
                fix="give 0.2 and 0.2 (or 0.28)",
            )
        self.scale: Scale = scale
        self.aggregate: Aggregate = aggregate
        self.clip_low, self.clip_high = clip_low, clip_high
        self.kl = kl
        needs: frozenset[Capability] = frozenset({"reference"} if beta > 0 and reference == "pretrained" else ())
        self.requires = needs | reward.requires
        self.keeps_start = beta > 0 and reference == "stage_start"
        self.uses_logits = temperature != 1

    def units(self, example: Example) -> float:
        """Tokens or answers that are learnt from."""
        if self.aggregate == "tokens":
            return super().units(example)
        return self.writer.answers(example)

    def begin_stage(self, learner: Learner, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """See `GroupWriter.begin_stage`."""
        return self.writer.begin_stage(learner, dataset, stage)

    def prepare(self, learner: Learner, batch: Batch) -> Batch:
        """Answers in the place of the examples' own completions."""
        return self.writer.prepare(learner, batch)

    def judged(self, learner: Learner, examples: Sequence[Example]) -> list[Example]:
        """Each prompt with one answer of the policy as it is."""
        return self.writer.judged(learner, examples)

    def losses(self, forward: Forward, batch: Batch, reference: Forward | None) -> ExampleLosses:
        """Σ_t of -min(ϱ_t A, clip(ϱ_t) A) + β K_t, each token as much as `aggregate` says; of other examples their
        likelihood.
        """
        nll, logits = self.writer.nll(forward, batch)
        if not self.writer.wrote(batch):
            return weighted(nll, None, batch, logits)
        log_p = -nll
        log_ratio = log_p - self.writer.old(batch, log_p)
        clips = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        advantages = branch_weights(batch)[batch.target_example, batch.target_branch]
        terms, clipped = clipped_surrogate(log_ratio, advantages, **clips)
        log = {**self.writer.log(batch), "policy/entropy": nll.detach().mean(), "clip/fraction": clipped.float().mean()}
        if self.writer.beta:
            known = self.writer.reference_of(batch)
            kind, corrected = ("k2", False) if self.kl == "k2" else ("k3", self.kl == "k3_ratio")
            penalty = kl_penalty(log_p, known, log_ratio, kind=kind, corrected=corrected)  # type: ignore[arg-type]
            terms = terms + self.writer.beta * penalty
            log["kl"] = kl_penalty(log_p, known, log_ratio, kind="k3", corrected=False).detach().mean()
        lengths = branch_sums(torch.ones_like(log_p), batch)
        share = answer_weights(lengths, aggregate=self.aggregate, longest=self.writer.max_new_tokens)
        weights = share[batch.target_example, batch.target_branch]
        return ExampleLosses(values=example_sums(weights * terms, batch), logits=logits, log=log)

    def state_dict(self) -> dict[str, Tensor]:
        """The answers of an unfinished rollout."""
        return self.writer.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse."""
        self.writer.load_state_dict(state)
