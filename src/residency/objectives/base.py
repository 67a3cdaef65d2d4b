"""The contract of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from residency.types import Batch, Example, Layout, Outputs

__all__ = ["Forward", "Objective"]

Forward = Callable[[Batch], Tensor]
"""Batch -> (M, V) logits at its supervised positions."""


class Objective(ABC):
    """A function of (forward, batch, reference), not a trainer: it never sees the model, the optimizer or the loop."""

    @abstractmethod
    def collate(self, examples: Sequence[Example], *, layout: Layout) -> Batch:
        """Lay examples out for this objective."""

    @abstractmethod
    def __call__(self, forward: Forward, batch: Batch, reference: Forward | None) -> Outputs:
        """The loss of one batch.

        Args:
            forward: The model being trained.
            batch: As `collate` made it.
            reference: The pretrained behaviour without gradient, or `None` where the adapter cannot provide it.
        """
