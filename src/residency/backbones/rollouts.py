"""Sampling groups of answers to prompts, as pure functions: one number per (prompt, copy, token) decides every draw.

The token is the inverse of the distribution function, over the order of the vocabulary, of softmax(logits / T) at that
number, in float64. No generator has a state, so the size of a batch, its order and whoever leaves it early change
nothing but the last bits of the logits. There is no top-k, top-p or repetition penalty: a policy gradient
differentiates the very distribution that was drawn from.

A prompt is read once for its whole group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from residency.backbones.packed_attention import Memory

__all__ = ["Anew", "Continued", "Remembered", "Uniform", "Written", "inverse_cdf", "sample_groups"]

Uniform = Callable[[int, int, int], float]
"""(number of the prompt, number of the copy, number of the token) -> a number in [0, 1)."""

# Share of the answers that must be done before the memory is copied without them.
_DONE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One answer.

    Args:
        tokens: Its tokens; the end token is the last one where it ended by itself.
        ended: Whether it did.
    """

    tokens: tuple[int, ...]
    ended: bool


class Continued(Protocol):
    """Texts that are continued token by token."""

    def begin(self, prompts: Sequence[Sequence[int]], *, copies: int, room: int) -> Tensor:
        """Read prompts; (P · copies, V) logits of the token behind each copy, copies of one prompt side by side."""

    def go_on(self, tokens: Tensor) -> Tensor:
        """Add one token to every text; (S, V) logits of the next."""

    def keep(self, places: Sequence[int]) -> None:
        """Forget all other texts."""


def inverse_cdf(logits: Tensor, uniform: Tensor, *, temperature: float = 1.0) -> Tensor:
    """(S,) the first token whose cumulated probability exceeds the number.

    Args:
        logits: (S, V).
        uniform: (S,) in [0, 1).
        temperature: T > 0.
    """
    cumulated = (logits.double() / temperature).softmax(-1).cumsum_(-1)
    at = uniform.double().to(logits.device)[:, None] * cumulated[:, -1:]
    # `right`: exceeds and not reaches, so that a token of probability 0 is never drawn.
    return torch.searchsorted(cumulated, at, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


@torch.no_grad()
def sample_groups(
    texts: Continued,
    prompts: Sequence[Sequence[int]],
    *,
    group: int,
    end: int,
    max_new_tokens: int,
    uniform: Uniform,
    temperature: float = 1.0,
) -> list[list[Written]]:
    """A group of answers per prompt.

    Args:
        texts: How the model goes on (`Remembered` or `Anew`), in evaluation mode.
        prompts: At least one token each.
        group: Answers per prompt.
        end: The end token; it is drawn like any other and part of the answer.
        max_new_tokens: Most tokens of an answer, at least 1.
        uniform: Decides every draw.
        temperature: Logits are divided by it.

    Returns:
        Per prompt its answers, copy by copy.
    """
    written: list[list[int]] = [[] for _ in range(len(prompts) * group)]
    live = list(range(len(written)))
    logits = texts.begin(prompts, copies=group, room=max_new_tokens)
    for count in range(max_new_tokens):
        draws = torch.tensor([uniform(*divmod(text, group), count) for text in live], dtype=torch.float64)
        token = inverse_cdf(logits, draws, temperature=temperature)
        going = []
        for place, (text, new) in enumerate(zip(live, token.tolist(), strict=True)):
            # Who is done stays in the batch until it pays to leave, and is not listened to.
            if not written[text] or written[text][-1] != end:
                written[text].append(new)
                if new != end:
                    going.append(place)
        if not going or count == max_new_tokens - 1:
            break
        if len(going) <= (1 - _DONE) * len(live):
            texts.keep(going)
            live, token = [live[place] for place in going], token[going]
        logits = texts.go_on(token)
    done = [Written(tokens=tuple(tokens), ended=tokens[-1] == end) for tokens in written]
    return [done[first : first + group] for first in range(0, len(done), group)]


class Remembered:
    """On a model that runs packed rows: prompts are read as packed rows, then one token per answer and step.

    Args:
        model: In evaluation mode.
        batch_tokens: Prompt tokens per forward pass.
    """

    def __init__(self, model: nn.Module, *, batch_tokens: int = 2048) -> None:
        self.model = model
        self.batch_tokens = batch_tokens

    def begin(self, prompts: Sequence[Sequence[int]], *, copies: int, room: int) -> Tensor:
        """See `Continued`."""
        lengths = [len(prompt) for prompt in prompts]
        self._memory = Memory(lengths, room=room - 1, device=next(self.model.parameters()).device)
        logits = torch.cat([self._read(part, prompts) for part in _parts(lengths, self.batch_tokens)])
        places = [p for p in range(len(prompts)) for _ in range(copies)]
        self._memory.keep(places)
        return logits[places]

    def go_on(self, tokens: Tensor) -> Tensor:
        """See `Continued`."""
        position = self._memory.lengths[:, None]
        self._memory.advance()
        out: Any = self.model(input_ids=tokens[:, None], position_ids=position, memory=self._memory, use_cache=False)
        result: Tensor = out.logits[:, -1]
        return result

    def keep(self, places: Sequence[int]) -> None:
        """See `Continued`."""
        self._memory.keep(places)

    def _read(self, part: range, prompts: Sequence[Sequence[int]]) -> Tensor:
        lengths = [len(prompts[k]) for k in part]
        device = self._memory.lengths.device
        self._memory.reads(part)
        out: Any = self.model(
            input_ids=torch.tensor([[token for k in part for token in prompts[k]]], device=device),
            position_ids=torch.tensor([[at for length in lengths for at in range(length)]], device=device),
            attention_mask=None,
            segments=tuple((length,) for length in lengths),
            memory=self._memory,
            logits_to_keep=torch.tensor(lengths, device=device).cumsum(0) - 1,
            use_cache=False,
        )
        result: Tensor = out.logits[0]
        return result


class Anew:
    """On any model: everything is read again for every token, which costs as many passes as an answer has tokens.

    Args:
        logits: Token sequences -> (S, V) logits of the token behind each.
    """

    def __init__(self, logits: Callable[[Sequence[Sequence[int]]], Tensor]) -> None:
        self.logits = logits

    def begin(self, prompts: Sequence[Sequence[int]], *, copies: int, room: int) -> Tensor:
        """See `Continued`."""
        self._texts = [list(prompt) for prompt in prompts for _ in range(copies)]
        return self.logits(self._texts)

    def go_on(self, tokens: Tensor) -> Tensor:
        """See `Continued`."""
        self._texts = [[*text, token] for text, token in zip(self._texts, tokens.tolist(), strict=True)]
        return self.logits(self._texts)

    def keep(self, places: Sequence[int]) -> None:
        """See `Continued`."""
        self._texts = [self._texts[place] for place in places]


def _parts(lengths: Sequence[int], tokens: int) -> list[range]:
    """Neighbours that have at most so many tokens together (a longer prompt is read alone)."""
    parts, first, used = [], 0, 0
    for index, length in enumerate(lengths):
        if index > first and used + length > tokens:
            parts.append(range(first, index))
            first, used = index, 0
        used += length
    return [*parts, range(first, len(lengths))]
