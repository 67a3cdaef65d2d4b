"""Answers that the policy itself writes, and what they are worth: functions of (weights, seed, stage, step)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from residency.backbones.rollouts import Anew, Remembered, Written, sample_groups
from residency.core.batching import by_token_budget, make_batch
from residency.core.randomness import seed_of
from residency.core.types import Branch, Example
from residency.objectives.base import Learner, Was
from residency.objectives.rewards.base import Answer, Question, Reward

__all__ = ["Scored", "answer_log_probs", "as_example", "questions", "rewarded", "write_answers"]

PASS_TOKENS = 2048  # without gradients memory is no question


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The answers of a step.

    Args:
        written: Per prompt its answers.
        rewards: (P, G) float64; NaN = could not be scored.
        parts: Mean of each part of the reward, by name.
    """

    written: list[list[Written]]
    rewards: Tensor
    parts: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """What is worth a line in the history."""
        lengths = [len(answer.tokens) for group in self.written for answer in group]
        cut = [not answer.ended for group in self.written for answer in group]
        known = self.rewards[~self.rewards.isnan()]
        lowest, highest = self.rewards.nan_to_num(math.inf).amin(-1), self.rewards.nan_to_num(-math.inf).amax(-1)
        return {
            "reward": float(known.mean()) if len(known) else math.nan,
            "reward/std": float(known.std(unbiased=False)) if len(known) else math.nan,
            **{f"reward/{name}": value for name, value in self.parts.items()},
            "groups/informative": float((highest > lowest).double().mean()),
            "rollouts/length": sum(lengths) / len(lengths),
            "rollouts/truncated": sum(cut) / len(cut),
        }


def write_answers(
    learner: Learner,
    examples: Sequence[Example],
    *,
    group: int,
    max_new_tokens: int,
    temperature: float,
    words: Sequence[str | int],
) -> list[list[Written]]:
    """A group of answers per example, by the policy as it is; dropout off.

    Args:
        learner: The module.
        examples: Their prompts are answered.
        group: Answers per prompt.
        max_new_tokens: Most tokens of an answer.
        temperature: Logits are divided by it.
        words: What the draws are for; with the run's seed, place, copy and token they decide every one.
    """
    seed = learner.stage.seed

    def uniform(place: int, copy: int, token: int) -> float:
        return seed_of(seed, *words, place, copy, token) / 2**63

    def next_logits(texts: Sequence[Sequence[int]]) -> Tensor:
        bare = [Example(domain="", row="", prompt=tuple(t), branches=(Branch(tokens=(0,)),)) for t in texts]
        return learner.forward(make_batch(bare, layout=learner.layout).to(learner.device))

    with learner.writing():
        texts = Remembered(learner.model) if learner.layout == "packed" else Anew(next_logits)
        written = sample_groups(
            texts,
            [example.prompt for example in examples],
            group=group,
            end=learner.backbone.tokenizer.eos_token_id,
            max_new_tokens=max_new_tokens,
            uniform=uniform,
            temperature=temperature,
        )
    if learner.layout == "packed":  # otherwise they are passes of the backbone, which counts them
        lengths = [[len(answer.tokens) for answer in answers] for answers in written]
        learner.backbone.work.wrote(learner.model, [len(example.prompt) for example in examples], lengths)
    return written


def questions(learner: Learner, examples: Sequence[Example]) -> list[Question]:
    """What was asked, as text; a row's own completion, where it has one, as the reference."""
    tokenizer = learner.backbone.tokenizer

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode([t for t in tokens if t != tokenizer.eos_token_id]))

    return [
        Question(
            prompt=text(e.prompt),
            reference=text(e.completion).strip(),
            row=f"{e.domain} {e.row}",
            extra=e.extra,
            ids=e.prompt,
        )
        for e in examples
    ]


def rewarded(
    learner: Learner, reward: Reward, examples: Sequence[Example], written: list[list[Written]], *, cut_is_zero: bool
) -> Scored:
    """What each answer is worth.

    Args:
        learner: For the tokenizer.
        reward: The reward.
        examples: What was asked.
        written: Per example its answers.
        cut_is_zero: An answer that did not end is worth the lowest reward at most 0, whatever it says.
    """
    tokenizer = learner.backbone.tokenizer
    asked, answers = [], []
    for question, group in zip(questions(learner, examples), written, strict=True):
        for each in group:
            ids = each.tokens[:-1] if each.ended else each.tokens
            asked.append(question)
            text, count = tokenizer.decode(ids), len(each.tokens)
            answers.append(Answer(text=text, tokens=count, ended=each.ended, ids=tuple(each.tokens)))
    values = [
        min(0.0, value) if value is not None and cut_is_zero and not answer.ended else value
        for value, answer in zip(reward(asked, answers), answers, strict=True)
    ]
    parts = {}
    for name, column in reward.parts(asked, answers).items():
        known = [value for value in column if value is not None]
        parts[name] = sum(known) / len(known) if known else math.nan
    numbers = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)
    return Scored(written=written, rewards=numbers.view(len(examples), -1), parts=parts)


def as_example(example: Example, group: Sequence[Written], weights: Sequence[float], learnt: Sequence[bool]) -> Example:
    """A prompt with its answers as branches.

    Args:
        example: The prompt.
        group: Its answers.
        weights: Of each.
        learnt: Whether its tokens are supervised.
    """
    branches = tuple(
        Branch(
            tokens=answer.tokens, mask=() if on else (False,) * len(answer.tokens), role="rollout", weight=float(weight)
        )
        for answer, weight, on in zip(group, weights, learnt, strict=True)
    )
    return replace(example, branches=branches)


def answer_log_probs(learner: Learner, examples: Sequence[Example], *, when: Was, temperature: float) -> list[Tensor]:
    """Per example the log-probabilities of its supervised tokens, branch by branch, float32, without gradient."""
    found: dict[int, Tensor] = {}
    with learner.as_it_was(when):
        for places, group in _groups(examples):
            batch = make_batch(group, layout=learner.layout).to(learner.device)
            if temperature == 1:
                nll = learner.backbone.nll(learner.model, batch)
            else:
                logits = learner.forward(batch).float() / temperature
                nll = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
            counts = batch.target_example.bincount(minlength=batch.size).tolist()
            found |= zip(places, (-nll).split(counts), strict=True)
    return [found[i] for i in range(len(examples))]


def _groups(examples: Sequence[Example]) -> Iterator[tuple[list[int], list[Example]]]:
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i]), i))
    places = iter(order)
    for group in by_token_budget([examples[i] for i in order], tokens=PASS_TOKENS):
        yield [next(places) for _ in group], group
