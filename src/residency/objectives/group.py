"""What on-policy objectives share: who writes the answers of a step, and what is remembered of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from residency.backbones.rollouts import Written
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Batch, Branch, Example, Stage
from residency.objectives.answers import Scored, answer_log_probs, as_example, questions, rewarded, write_answers
from residency.objectives.base import Forward, Learner, target_nll
from residency.objectives.dataset import Mapped, Repeated, distinct
from residency.objectives.rewards.base import Reward

__all__ = ["GroupWriter", "Truncated"]

Truncated = Literal["zero", "mask", "as_is"]

ASKED = 32  # prompts on which a stage's start is judged


@dataclass(frozen=True, kw_only=True)
class _Rollout:
    """Answers of a global batch: examples with answers as branches, what of them is known per token, and figures."""

    key: tuple[int, int]
    examples: tuple[Example, ...]
    old: list[Tensor]
    reference: list[Tensor]
    metrics: dict[str, float]


class GroupWriter:
    """Writes answers, has them rewarded, and turns rewards into weights of branches.

    Args:
        owner: Name of the objective, for messages.
        reward: What an answer is worth.
        group: Answers per prompt.
        max_new_tokens: Most tokens of an answer.
        temperature: Logits are divided by it, in sampling and in every log-probability.
        beta: Weight of the divergence from the reference.
        reference: Which.
        updates: Optimizer steps per rollout.
        truncated: What becomes of answers that were cut off.
        informative: Smallest share of groups with unequal rewards at the start of a stage.
        advantages: (P, G) rewards -> (P, G).
        kl_in_reward: Take β Σ_t (log π - log ρ) off the reward of an answer.

    Raises:
        UserError: A value is out of range.
    """

    def __init__(
        self,
        *,
        owner: str,
        reward: Reward,
        group: int,
        max_new_tokens: int,
        temperature: float,
        beta: float,
        reference: Literal["stage_start", "pretrained"],
        updates: int,
        truncated: Truncated,
        informative: float,
        advantages: Callable[[Tensor], Tensor],
        kl_in_reward: bool,
    ) -> None:
        if (
            group < 2
            or max_new_tokens < 1
            or not temperature > 0
            or beta < 0
            or updates < 1
            or not 0 <= informative <= 1
        ):
            raise UserError(
                f"{owner} with group={group}, max_new_tokens={max_new_tokens}, temperature={temperature}, beta={beta}, "
                f"updates={updates}, informative={informative}",
                why="an answer is compared with others of its group (at least 2), has a token or more, and is drawn at "
                "a temperature above 0; beta is not negative, updates at least 1, informative a share",
                fix="use group: 8, max_new_tokens: 32, temperature: 1.0, beta: 0.0, updates: 1, informative: 0.05",
            )
        self.owner = owner
        self.reward = reward
        self.group = group
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.beta = beta
        self.reference: Literal["stage_start", "pretrained"] = reference
        self.updates = updates
        self.truncated: Truncated = truncated
        self.informative = informative
        self.advantages = advantages
        self.kl_in_reward = kl_in_reward
        self._rollout: _Rollout | None = None

    # -- a stage and a step -------------------------------------------------------------------------------------

    def begin_stage(self, learner: Learner, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """Check the rows, and that the start of the stage has something to learn from.

        Raises:
            UserError: The reward cannot judge a row, or hardly any group of answers has unequal rewards.
        """
        self._rollout = None
        dataset = Mapped(dataset, Example.last_turn)  # of a conversation the last answer is written
        examples = distinct(dataset)
        self.reward.begin_stage(learner)
        self.reward.check(questions(learner, examples))
        if self.informative:
            asked = examples[:ASKED]
            share = self._scored(learner, asked, ("gate", stage.index)).metrics()
            if share["groups/informative"] < self.informative:
                raise UserError(
                    f"{self.owner} on {stage.domain}: {share['groups/informative']:.0%} of {len(asked)} groups of "
                    f"{self.group} answers have unequal rewards (mean reward {share['reward']:.3f}, "
                    f"{share['rollouts/truncated']:.0%} of the answers were cut off)",
                    why="without a difference within a group there is no gradient",
                    fix="learn a short SFT stage on these rows first, use LabelPolicy where answers are labels, raise "
                    "group or max_new_tokens, or set model.objective.informative to 0",
                )
        return dataset if self.updates == 1 else Repeated(dataset, times=self.updates, batch_size=stage.batch_size)

    def prepare(self, learner: Learner, batch: Batch) -> Batch:
        """The micro-batch with answers as branches; written for the whole step where they are not there yet."""
        whole = batch.whole
        key = learner.stage.index, learner.global_step // self.updates
        if self._rollout is None or self._rollout.key != key:
            self._rollout = self._write(learner, whole.examples, key)
        examples = self._rollout.examples
        own = make_batch([examples[slot] for slot in whole.slots], layout=learner.layout).to(learner.device)
        return replace(own, part_of=replace(whole, examples=examples))

    def judged(self, learner: Learner, examples: Sequence[Example]) -> list[Example]:
        """Each prompt with one answer of the policy as it is, to be judged by its likelihood: the squared gradient of
        that is the Fisher information under the policy's own distribution, drawn once per prompt.
        """
        written = self._answers(learner, examples, ("judged", learner.stage.index), group=1)
        return [replace(e, branches=(Branch(tokens=g[0].tokens),)) for e, g in zip(examples, written, strict=True)]

    def answers(self, example: Example) -> float:
        """How many answers are learnt from."""
        return float(sum(bool(branch.supervised) for branch in example.branches))

    # -- what is known of a batch -------------------------------------------------------------------------------

    def wrote(self, batch: Batch) -> bool:
        """Whether the batch holds answers of a step."""
        return batch.examples[0].branches[0].role == "rollout"

    def nll(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(M,) nats of the targets at the temperature, and logits where they were computed."""
        if self.temperature == 1:
            return target_nll(forward, batch)
        logits = forward(batch)
        scaled = logits.float() / self.temperature
        return torch.nn.functional.cross_entropy(scaled, batch.targets, reduction="none"), logits

    def old(self, batch: Batch, log_p: Tensor) -> Tensor:
        """(M,) log-probabilities under the policy that wrote; with one update per rollout it is this very one."""
        if self.updates == 1 or batch.part_of is None or self._rollout is None:
            return log_p.detach()
        return torch.cat([self._rollout.old[slot] for slot in batch.part_of.slots]).to(log_p.device)

    def reference_of(self, batch: Batch) -> Tensor:
        """(M,) log-probabilities under the reference."""
        assert self._rollout is not None
        return torch.cat([self._rollout.reference[slot] for slot in batch.whole.slots]).to(batch.targets.device)

    def log(self, batch: Batch) -> dict[str, Tensor]:
        """Figures of the step's answers."""
        metrics = {} if self._rollout is None or batch.part_of is None else self._rollout.metrics
        return {name: torch.tensor(value) for name, value in metrics.items()}

    # -- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """An unfinished rollout: the weights that wrote it are gone. With one update there is none."""
        rollout = self._rollout
        if self.updates == 1 or rollout is None:
            return {}
        answers = [[[b.tokens, bool(b.supervised), b.weight] for b in e.branches] for e in rollout.examples]
        prompts = [[e.domain, e.row, e.prompt] for e in rollout.examples]
        facts = {"key": rollout.key, "answers": answers, "prompts": prompts, "metrics": rollout.metrics}
        tensors = {f"old/{i}": t.cpu() for i, t in enumerate(rollout.old)}
        tensors |= {f"reference/{i}": t.cpu() for i, t in enumerate(rollout.reference)}
        return {"facts": torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8), **tensors}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        if not state:
            return
        facts = json.loads(bytes(state["facts"].tolist()))
        examples = []
        for (domain, row, prompt), answers in zip(facts["prompts"], facts["answers"], strict=True):
            branches = tuple(
                Branch(tokens=tuple(t), mask=() if on else (False,) * len(t), role="rollout", weight=weight)
                for t, on, weight in answers
            )
            examples.append(Example(domain=domain, row=row, prompt=tuple(prompt), branches=branches))
        count = len(examples)
        self._rollout = _Rollout(
            key=(facts["key"][0], facts["key"][1]),
            examples=tuple(examples),
            old=[state[f"old/{i}"] for i in range(count)],
            reference=[state[f"reference/{i}"] for i in range(count) if f"reference/{i}" in state],
            metrics=facts["metrics"],
        )

    # -- writing ------------------------------------------------------------------------------------------------

    def _write(self, learner: Learner, examples: tuple[Example, ...], key: tuple[int, int]) -> _Rollout:
        scored = self._scored(learner, examples, ("rollout", *key))
        kept = [[self.truncated != "mask" or answer.ended for answer in group] for group in scored.written]
        bare = [as_example(e, g, [1.0] * len(g), k) for e, g, k in zip(examples, scored.written, kept, strict=True)]
        metrics, rewards = scored.metrics(), scored.rewards
        old: list[Tensor] = []
        reference: list[Tensor] = []
        if self.updates > 1 or (self.beta and self.kl_in_reward):
            old = answer_log_probs(learner, bare, when="now", temperature=self.temperature)
        if self.beta:
            reference = answer_log_probs(learner, bare, when=self.reference, temperature=self.temperature)
        if self.beta and self.kl_in_reward:
            kl = torch.stack([_per_answer(a - b, e) for a, b, e in zip(old, reference, bare, strict=True)])
            metrics["kl"] = float(kl.mean())
            rewards = rewards - self.beta * kl.cpu()
        masked = torch.where(torch.tensor(kept), rewards, torch.nan)
        weights = self.advantages(masked).tolist()
        together = zip(examples, scored.written, weights, kept, strict=True)
        return _Rollout(
            key=key,
            examples=tuple(as_example(e, g, w, k) for e, g, w, k in together),
            old=old,
            reference=reference,
            metrics=metrics,
        )

    def _scored(self, learner: Learner, examples: Sequence[Example], words: Sequence[str | int]) -> Scored:
        written = self._answers(learner, examples, words, group=self.group)
        return rewarded(learner, self.reward, examples, written, cut_is_zero=self.truncated == "zero")

    def _answers(
        self, learner: Learner, examples: Sequence[Example], words: Sequence[str | int], *, group: int
    ) -> list[list[Written]]:
        return write_answers(
            learner,
            examples,
            group=group,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            words=words,
        )


def _per_answer(values: Tensor, example: Example) -> Tensor:
    """(G,) sums, float64, over the answers' supervised tokens."""
    counts = [len(branch.supervised) for branch in example.branches]
    return torch.stack([part.double().sum() for part in values.split(counts)])
