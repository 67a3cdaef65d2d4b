"""Greedy decoding of many prompts at once on a model that runs packed rows: nothing is padded, whoever is done leaves.

The prompts are read as one packed row. `packed_attention` keeps what every layer has computed of them in a `Memory`;
after that each step reads one token per prompt that is still being continued.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from residency.backbones.base import Sampling
from residency.backbones.packed_attention import Memory

__all__ = ["decoded_logits", "greedy", "seeded"]

# Share of the prompts that must be done before the memory is copied without them.
_DONE = 0.25


@torch.inference_mode()
def greedy(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, end: int, max_new_tokens: int, batch_tokens: int = 1024
) -> list[list[int]]:
    """The likeliest token again and again.

    Args:
        model: Runs packed rows (`residency.backbones.layout`).
        prompts: At least one token each.
        end: Ends a continuation; not part of it.
        max_new_tokens: Most tokens of a continuation.
        batch_tokens: Prompt tokens per forward pass.

    Returns:
        One continuation per prompt.
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    lengths = [len(prompt) for prompt in prompts]
    device = next(model.parameters()).device
    memory = Memory(lengths, room=max_new_tokens - 1, device=device)
    parts = _parts(lengths, batch_tokens)
    token = torch.cat([_read(model, memory, part, prompts).argmax(-1) for part in parts])
    written: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    for count in range(1, max_new_tokens + 1):
        going = []
        for place, (prompt, new) in enumerate(zip(live, token.tolist(), strict=True)):
            # Who is done stays in the batch until it pays to leave, and is not listened to.
            if new == end or (written[prompt] and written[prompt][-1] == end):
                written[prompt].append(end)
                continue
            written[prompt].append(new)
            going.append(place)
        if not going or count == max_new_tokens:
            break
        if len(going) <= (1 - _DONE) * len(live):
            memory.keep(going)
            live, token = [live[place] for place in going], token[going]
        token = _next(model, memory, token).argmax(-1)
    return [ids[: ids.index(end)] if end in ids else ids for ids in written]


@torch.no_grad()
def decoded_logits(model: nn.Module, texts: Sequence[Sequence[int]], *, steps: int) -> Tensor:
    """What `greedy` reads: the logits behind the last tokens of texts, of which all before are kept in a memory.

    Args:
        model: As for `greedy`.
        texts: More than `steps` tokens each.
        steps: How many tokens of each text are read one by one.

    Returns:
        (len(texts), steps + 1, V): behind the last token of the beginning, and behind each further one.
    """
    beginnings = [text[: len(text) - steps] for text in texts]
    device = next(model.parameters()).device
    memory = Memory([len(text) for text in beginnings], room=steps, device=device)
    found = [_read(model, memory, range(len(texts)), beginnings)]
    for step in range(steps, 0, -1):
        found.append(_next(model, memory, torch.tensor([text[-step] for text in texts], device=device)))
    return torch.stack(found, 1)


def _next(model: nn.Module, memory: Memory, token: Tensor) -> Tensor:
    """Add a token to every text; the logits behind it, (B, V)."""
    position = memory.lengths[:, None]
    memory.advance()
    out: Any = model(input_ids=token[:, None], position_ids=position, memory=memory, use_cache=False)
    logits: Tensor = out.logits[:, -1]
    return logits


def _parts(lengths: Sequence[int], tokens: int) -> list[range]:
    """Neighbours that have at most so many tokens together (a longer prompt is read alone)."""
    parts, first, used = [], 0, 0
    for index, length in enumerate(lengths):
        if index > first and used + length > tokens:
            parts.append(range(first, index))
            first, used = index, 0
        used += length
    return [*parts, range(first, len(lengths))]


def _read(model: nn.Module, memory: Memory, part: range, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Fill the memory of some prompts; the logits behind each, (len(part), V)."""
    lengths = [len(prompts[k]) for k in part]
    device = memory.lengths.device
    memory.reads(part)
    out: Any = model(
        input_ids=torch.tensor([[token for k in part for token in prompts[k]]], device=device),
        position_ids=torch.tensor([[at for length in lengths for at in range(length)]], device=device),
        attention_mask=None,
        segments=tuple((length,) for length in lengths),
        memory=memory,
        logits_to_keep=torch.tensor(lengths, device=device).cumsum(0) - 1,
        use_cache=False,
    )
    logits: Tensor = out.logits[0]
    return logits


@contextmanager
def seeded(sampling: Sampling | None, device: torch.device) -> Iterator[None]:
    """Lend transformers, which draws from the global generator, a seed, and bring the generator back."""
    if sampling is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        yield
