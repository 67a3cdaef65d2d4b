"""The contract of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from residency.core.types import Batch, Example, Layout, Outputs

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
    """A function of (forward, batch, reference), not a trainer: it never sees the model, the optimizer or the loop."""

    @abstractmethod
    def collate(self, examples: Sequence[Example], *, layout: Layout) -> Batch:
        """Lay examples out for this objective."""

    @abstractmethod
    def __call__(self, forward: Forward, batch: Batch, reference: Forward | None) -> Outputs:
        """The loss of one batch.

        Args:
            forward: The model being trained; a `Passes` where nobody else reads the logits.
            batch: As `collate` made it.
            reference: The pretrained behaviour without gradient, or `None` where the adapter cannot provide it.
        """
