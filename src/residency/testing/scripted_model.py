"""A pretrained model whose answers and likelihoods are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from residency.core.types import Example

__all__ = ["ScriptedModel"]


class ScriptedModel:
    """Writes what a function says, and finds a text as unlikely as another one says.

    Args:
        tokenizer: Any.
        answer: (request, seed) -> what is written.
        nll: Decoded (prompt, branch) -> nats.
        name: What tells it from others.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        answer: Callable[[str, int], str | None],
        nll: Callable[[str, str], float] = lambda prompt, branch: 1.0,
        name: str = "scripted",
    ) -> None:
        self.tokenizer, self.answer, self.found, self.name = tokenizer, answer, nll, name
        self.tokens = 0
        self.asked: list[tuple[str, int, int]] = []
        self.released = 0

    def identity(self) -> Mapping[str, str]:
        """Its name."""
        return {"weights": self.name}

    def write(self, request: str, *, max_new_tokens: int, temperature: float, seed: int) -> str | None:
        """What was given; ten tokens."""
        self.asked.append((request, max_new_tokens, seed))
        self.tokens += 10
        return self.answer(request, seed)

    def nll(self, example: Example) -> tuple[float, ...]:
        """What was given for every branch."""
        prompt = self.tokenizer.decode(example.prompt)
        return tuple(self.found(prompt, self.tokenizer.decode(b.tokens)) for b in example.branches)

    def release(self) -> None:
        """Counted."""
        self.released += 1
