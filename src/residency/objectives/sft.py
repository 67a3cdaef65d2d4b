"""Supervised fine-tuning: next-token likelihood of the completion."""

from __future__ import annotations

from collections.abc import Sequence

from residency.core.batching import make_batch
from residency.core.losses import token_nll  # moved
from residency.core.types import Batch, Example, Layout, Outputs
from residency.objectives.base import Forward, Objective, Passes

__all__ = ["SFT", "token_nll"]


class SFT(Objective):
    """Mean negative log-likelihood per completion token, in nats; prompts are not supervised."""

    def collate(self, examples: Sequence[Example], *, layout: Layout) -> Batch:
        """One segment (packed) or row (padded) per example."""
        return make_batch(examples, layout=layout)

    def __call__(self, forward: Forward, batch: Batch, reference: Forward | None) -> Outputs:
        """The loss; `reference` is not used. Without logits where nobody else reads them."""
        normaliser = batch.normaliser(self.units)
        if isinstance(forward, Passes):
            return Outputs(loss=forward.nll(batch).sum() / normaliser, logits=None, log={})
        logits = forward(batch)
        return Outputs(loss=token_nll(logits, batch.targets).sum() / normaliser, logits=logits, log={})
