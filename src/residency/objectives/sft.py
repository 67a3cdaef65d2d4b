"""Supervised fine-tuning: next-token likelihood of what is supervised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from residency.core.losses import token_nll
from residency.core.types import Batch, Branch, Example, Stage
from residency.objectives.base import ExampleLosses, Forward, Learner, Objective, refuse, target_nll
from residency.objectives.dataset import Mapped, example_sums
from residency.objectives.token_losses import effective_share, smoothed_nll

__all__ = ["SFT", "FullText", "token_nll", "weighted"]


class SFT(Objective):
    """Mean negative log-likelihood per supervised token, in nats: of completions, of an assistant's turns, of text.

    Args:
        label_smoothing: ε: the target is (1 - ε) of the token and ε of the whole vocabulary alike. Above 0 it needs
            whole distributions.
    """

    shardable = True

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise refuse(
                self,
                f"label_smoothing={label_smoothing}",
                why="it is the share of a target that is spread over the vocabulary",
                fix="give a number in [0, 1)",
            )
        self.label_smoothing = label_smoothing
        self.uses_logits = label_smoothing > 0

    def losses(self, forward: Forward, batch: Batch, reference: Forward | None) -> ExampleLosses:
        """Σ nll of each example; without logits where nobody else reads them."""
        if not self.label_smoothing:
            nll, logits = target_nll(forward, batch)
            return weighted(nll, None, batch, logits)
        logits = forward(batch)
        return weighted(smoothed_nll(logits, batch.targets, smoothing=self.label_smoothing), None, batch, logits)


class FullText(Objective):
    """Continued pretraining: prompts are learnt like completions, every token but the first of a row."""

    learns_prompts: ClassVar[bool] = True
    shardable = True
    not_on_classifiers = "it learns the tokens of prompts, and a classifier has a head for labels only"

    def begin_stage(self, learner: Learner, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """Rows as text."""
        return Mapped(dataset, as_text)

    def losses(self, forward: Forward, batch: Batch, reference: Forward | None) -> ExampleLosses:
        """Σ nll of each example."""
        nll, logits = target_nll(forward, batch)
        return weighted(nll, None, batch, logits)


def as_text(example: Example) -> Example:
    """The first token as the prompt, all others as one supervised branch."""
    if len(example.prompt) == 1 or not example.branches:
        return example
    first = example.branches[0]
    whole = Branch(tokens=(*example.prompt[1:], *first.tokens), weight=first.weight)
    return replace(example, prompt=example.prompt[:1], branches=(whole,))


def weighted(nll: Tensor, weights: Tensor | None, batch: Batch, logits: Tensor | None) -> ExampleLosses:
    """Σ_t w_t nll_t of each example, and how unequal the weights are.

    Args:
        nll: (M,) loss of each target.
        weights: (M,) without gradient; `None` = all alike. Those of the branches come on top.
        batch: For the examples.
        logits: Handed on.
    """
    own = batch.target_weights
    if weights is not None:
        own = weights if own is None else own * weights
    values = nll if own is None else own * nll
    log = {}
    if weights is not None:
        plain = nll.detach()
        log = {"nll": plain.mean(), "weight/mean": weights.mean(), "weight/ess": effective_share(weights)}
    return ExampleLosses(values=example_sums(values, batch), logits=logits, log=log)
