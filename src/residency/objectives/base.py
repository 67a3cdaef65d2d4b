"""The contract of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from residency.core.types import Batch, Example, Layout, Outputs, supervised_tokens

__all__ = ["Forward", "Objective", "Passes"]

Forward = Callable[[Batch], Tensor]
"""Batch -> (M, V) logits at its supervised positions."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """A `Forward` that can also do without logits.

    Args:
        logits: Batch -> (M, V).
        nll: Batch -> (M,) nats of its targets: faster, and without logits in memory.
    """

    logits: Forward
    nll: Forward

    def __call__(self, batch: Batch) -> Tensor:
        """(M, V) logits."""
        return self.logits(batch)


class Objective(ABC):
    """A function of (forward, batch, reference), not a trainer: it never sees the model, the optimizer or the loop.

    **One normaliser per step.** The loss of a step is a sum over its global batch divided by the `units` of that batch,
    however it is cut into micro-batches. The Trainer averages the losses of the micro-batches; so the loss of one of
    them is its own sum over `Batch.normaliser(units)`, the mean number of units per micro-batch, and never the mean
    over its own units, which would weigh a token by how many others happened to lie beside it.
    """

    @abstractmethod
    def collate(self, examples: Sequence[Example], *, layout: Layout) -> Batch:
        """Lay examples out for this objective."""

    def units(self, example: Example) -> float:
        """How much an example counts in the normaliser of a step: its supervised tokens."""
        return supervised_tokens(example)

    @abstractmethod
    def __call__(self, forward: Forward, batch: Batch, reference: Forward | None) -> Outputs:
        """The loss of one batch: a sum over it, divided by `batch.normaliser(self.units)`.

        Args:
            forward: The model being trained; a `Passes` where nobody else reads the logits.
            batch: As `collate` made it.
            reference: The pretrained behaviour without gradient, or `None` where the adapter cannot provide it.
        """
