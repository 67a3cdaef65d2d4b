"""Supervised fine-tuning with weights that rows have from the start of a stage: FLOW, STM.

What the model says of a row before the first step decides; so one pass over the rows is all they cost, and a row that
is replayed in a later stage keeps the weight or the mask with which it was learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from residency.core.errors import UserError
from residency.core.types import Batch, Example, Stage
from residency.objectives.base import ExampleLosses, Forward, Learner, Objective, Was, refuse, target_nll
from residency.objectives.dataset import Mapped, own_rows, token_values
from residency.objectives.sft import weighted
from residency.objectives.token_losses import flow_weights, low_perplexity_mask

__all__ = ["FLOW", "STM"]

Start = Literal["stage_start", "pretrained"]


class FLOW(Objective):
    """Upweighting what the model knows already (Sanyal et al. 2025, arXiv:2502.02797): exp(-mean nll / τ) per row.

    Args:
        tau: τ in nats; `null` = the median of the rows' means.
        start: Which model is asked: `stage_start` (in the first stage the same), or `pretrained` (the adapter must
            provide `reference`).
    """

    shardable = True

    def __init__(self, *, tau: float | None = None, start: Start = "stage_start") -> None:
        if tau is not None and tau <= 0:
            raise refuse(self, f"tau={tau}", why="weights are exp(-mean nll / tau)", fix="give tau: null, or above 0")
        self.tau = tau
        self.start: Start = start
        self.requires = frozenset({"reference"}) if start == "pretrained" else frozenset()

    def begin_stage(self, learner: Learner, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """Weigh the rows of the stage's own domain."""
        own, means = _token_nll(learner, self, dataset, stage, self.start)
        weights = flow_weights(torch.stack([nll.mean() for nll in means]), tau=self.tau).tolist()
        of = dict(zip(own, weights, strict=True))

        def weigh(example: Example) -> Example:
            factor = of.get(example, 1.0)
            branches = tuple(replace(branch, weight=branch.weight * factor) for branch in example.branches)
            return replace(example, branches=branches)

        return Mapped(dataset, weigh)

    def losses(self, forward: Forward, batch: Batch, reference: Forward | None) -> ExampleLosses:
        """Σ w_row nll_t."""
        nll, logits = target_nll(forward, batch)
        found = weighted(nll, None, batch, logits)
        own = batch.target_weights
        mean = torch.ones(()) if own is None else own.mean()
        return ExampleLosses(values=found.values, logits=logits, log={"nll": nll.detach().mean(), "weight/mean": mean})


class STM(Objective):
    """Selective token masking (Wu et al. 2025, arXiv:2501.14315): tokens that surprise the start are not learnt at all.

    A row without a token that is left is not learnt from; another one takes its place.

    Args:
        threshold: θ, the largest perplexity of a token that is kept (2.5: p >= 0.4).
        start: Which model is asked: `stage_start`, or `pretrained` (the adapter must provide `reference`).
    """

    shardable = True

    def __init__(self, *, threshold: float = 2.5, start: Start = "stage_start") -> None:
        if not threshold > 1:
            raise refuse(
                self, f"threshold={threshold}", why="no token has a perplexity of 1 or less", fix="give threshold: 2.5"
            )
        self.threshold = threshold
        self.start: Start = start
        self.requires = frozenset({"reference"}) if start == "pretrained" else frozenset()

    def begin_stage(self, learner: Learner, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """Mask the rows of the stage's own domain.

        Raises:
            UserError: No token of any row is left.
        """
        own, nlls = _token_nll(learner, self, dataset, stage, self.start)
        keep = {e: low_perplexity_mask(nll, threshold=self.threshold).bool() for e, nll in zip(own, nlls, strict=True)}
        masked = {e: _masked(e, kept.tolist()) for e, kept in keep.items() if bool(kept.any())}
        if not masked:
            raise UserError(
                f"STM with threshold={self.threshold} on {stage.domain!r}: no token of {len(own)} rows is left",
                why="tokens that the model does not expect are not learnt, and it expects none of these",
                fix="raise model.objective.threshold, learn a stage with SFT first, or use FLOW or EAFT",
            )
        others = list(masked.values())
        substitutes = {e: others[i % len(others)] for i, e in enumerate(keep) if e not in masked}
        table = {**masked, **substitutes}
        return Mapped(dataset, lambda example: table.get(example, example))

    def losses(self, forward: Forward, batch: Batch, reference: Forward | None) -> ExampleLosses:
        """Σ nll_t over the tokens that are left."""
        nll, logits = target_nll(forward, batch)
        return weighted(nll, None, batch, logits)


def _token_nll(
    learner: Learner, objective: Objective, dataset: Sequence[Example], stage: Stage, start: Start
) -> tuple[list[Example], list[torch.Tensor]]:
    """The distinct examples of the stage's own domain, and the nats of each of their targets."""
    when: Was = "now" if start == "stage_start" else "pretrained"
    own = own_rows(dataset, stage.domain)
    found: dict[Example, torch.Tensor] = {}
    for batch, nll in token_values(learner, objective, own, when=when):
        counts = batch.target_example.bincount(minlength=batch.size).tolist()
        found |= zip(batch.examples, nll.cpu().split(counts), strict=True)
    return own, [found[example] for example in own]


def _masked(example: Example, kept: Sequence[bool]) -> Example:
    branches, start = [], 0
    for branch in example.branches:
        places = branch.supervised
        own = {place for place, keep in zip(places, kept[start : start + len(places)], strict=True) if keep}
        branches.append(replace(branch, mask=tuple(k in own for k in range(len(branch.tokens)))))
        start += len(places)
    return replace(example, branches=tuple(branches))
