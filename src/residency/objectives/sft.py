"""Supervised fine-tuning: next-token likelihood of the completion."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F

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
        if isinstance(forward, Passes):
            return Outputs(loss=forward.nll(batch).mean(), logits=None, log={})
        logits = forward(batch)
        loss = F.cross_entropy(logits.float(), batch.targets)
        return Outputs(loss=loss, logits=logits, log={})
