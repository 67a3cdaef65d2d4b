"""The contract of a backbone: load it, run it, name it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from residency.objectives.sft import token_nll
from residency.types import Batch, Layout

__all__ = ["Backbone"]


class Backbone(ABC):
    """A pretrained model and its tokenizer."""

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use."""

    @abstractmethod
    def load(self) -> nn.Module:
        """A fresh copy of the pretrained model, on the CPU, in evaluation mode."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(M, V) logits at the supervised positions of a batch, nowhere else."""

    def target_nll(self, model: nn.Module, batch: Batch) -> Tensor:
        """(M,) negative log-likelihood of each target in nats, float32, for scoring: without a gradient."""
        return token_nll(self.logits(model, batch), batch.targets)

    @abstractmethod
    def generate(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, layout: Layout = "padded"
    ) -> list[list[int]]:
        """Greedy continuations, one per prompt, without the end token.

        Args:
            model: With its adapter.
            prompts: At least one token each.
            max_new_tokens: Most tokens of a continuation.
            layout: `packed` if the model has been found to run packed rows (`residency.layout`).
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """What identifies the pretrained state: hashes of weights and tokenizer, dtype, quantisation."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Name, licence and remarks for the record."""
