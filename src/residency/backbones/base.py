"""The contract of a backbone: load it, run it, name it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from residency.types import Batch

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

    @abstractmethod
    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> list[list[int]]:
        """Continuations, one per prompt, without the end token.

        Args:
            model: The attached model, in evaluation mode.
            prompts: Token ids, at least one prompt of at least one token.
            max_new_tokens: Longest continuation; one that is as long as this was cut off.
            temperature: Of sampling, above 0; `None` = greedy.
            top_k: Sample among the k most likely tokens only; `None` = all. Needs a temperature.
            seed: Of sampling, which needs one; the global generators are left as they were.

        Raises:
            ValueError: Sampling without a seed, or `top_k` or `seed` without a temperature.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """What identifies the pretrained state: hashes of weights and tokenizer, dtype, quantisation."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Name, licence and remarks for the record."""
