"""Greedy decoding with a memory: what the model writes when it reads everything anew for every token."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from residency.backbones import CausalLM
from residency.backbones.generation import greedy


@torch.no_grad()
def anew(plain: nn.Module, prompt: list[int], *, end: int, limit: int) -> list[int]:
    """Transformers' own model on the whole sequence, again and again."""
    ids = list(prompt)
    for _ in range(limit):
        token = int(plain(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == end:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral_folder"])
@pytest.mark.parametrize("batch_tokens", [1, 20, 1000])
def test_memory_is_reading_anew(architecture: str, batch_tokens: int, request: pytest.FixtureRequest) -> None:
    """Ragged prompts (one of a single token), rows that end early and late, a sliding window, several prompt passes."""
    folder: Path = request.getfixturevalue(architecture)
    model, plain = CausalLM(path=str(folder)).load(), AutoModelForCausalLM.from_pretrained(folder).eval()
    draw = random.Random(0)
    prompts = [draw.choices(range(1, 257), k=n) for n in (1, 9, 4, 4, 15, 2, 30)]
    for first in (1, 3):
        # An untrained model hardly ever ends, so that a token it does write is made the end token.
        end = anew(plain, prompts[first], end=-1, limit=first)[-1]
        wanted = [anew(plain, prompt, end=end, limit=12) for prompt in prompts]
        assert greedy(model, prompts, end=end, max_new_tokens=12, batch_tokens=batch_tokens) == wanted
        assert greedy(model, prompts, end=end, max_new_tokens=1) == [ids[:1] for ids in wanted]
        assert min(map(len, wanted)) < 12, "some row must end before the others"
    assert greedy(model, prompts, end=end, max_new_tokens=0) == [[] for _ in prompts]
    assert greedy(model, [], end=end, max_new_tokens=3) == []
