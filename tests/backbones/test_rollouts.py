"""Sampled answers are functions of their numbers: the same for any batch, with and without a memory, rightly drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from residency.backbones import CausalLM
from residency.backbones.rollouts import Anew, Remembered, inverse_cdf, sample_groups
from residency.core.randomness import seed_of


def uniform(prompt: int, copy: int, token: int) -> float:
    return seed_of(0, prompt, copy, token) / 2**63


def anew(folder: Path) -> Anew:
    """Transformers' own model, one text at a time."""
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()

    def logits(texts: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.stack([plain(input_ids=torch.tensor([text])).logits[0, -1] for text in texts])

    return Anew(logits)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral_folder"])
def test_a_memory_is_reading_anew(architecture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(architecture)
    model = CausalLM(path=str(folder)).load()
    draw = random.Random(0)
    prompts = [draw.choices(range(1, 257), k=n) for n in (1, 9, 4, 15)]
    settings: dict[str, Any] = {"group": 3, "max_new_tokens": 8, "uniform": uniform, "temperature": 0.7}
    first = sample_groups(anew(folder), prompts, end=-1, **settings)
    # An untrained model hardly ever ends: a token that it does write is made the end token.
    end = first[1][2].tokens[3]
    wanted = sample_groups(anew(folder), prompts, end=end, **settings)
    assert sample_groups(Remembered(model), prompts, end=end, **settings) == wanted
    assert sample_groups(Remembered(model, batch_tokens=1), prompts, end=end, **settings) == wanted
    answers = [answer for group in wanted for answer in group]
    assert any(answer.ended and len(answer.tokens) < 8 for answer in answers)
    assert any(not answer.ended and len(answer.tokens) == 8 for answer in answers)
    assert all((answer.tokens[-1] == end) == answer.ended for answer in answers)
    assert len({answer.tokens for answer in wanted[0]}) > 1, "copies draw for themselves"
    # One prompt alone draws what it drew among others.
    alone = sample_groups(
        Remembered(model), prompts[2:3], end=end, **settings | {"uniform": lambda p, c, t: uniform(2, c, t)}
    )
    assert alone == wanted[2:3]


def test_the_global_generator_is_left_alone(llama: Path) -> None:
    before = torch.get_rng_state()
    model = CausalLM(path=str(llama)).load()
    torch.set_rng_state(before)
    sample_groups(Remembered(model), [[5, 6]], group=2, end=-1, max_new_tokens=3, uniform=uniform)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, -30.0, 2.0])
    numbers = torch.rand(4096, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for temperature in (1.0, 0.5):
        drawn = inverse_cdf(logits.expand(4096, 5), numbers, temperature=temperature)
        count = torch.bincount(drawn, minlength=5)
        assert count[3] == 0
        seen = [0, 1, 2, 4]
        expected = 4096 * (logits.double() / temperature).softmax(-1)[seen]
        expected *= 4096 / expected.sum()
        assert chisquare(count[seen].double().numpy(), expected.numpy()).pvalue > 1e-3


def test_the_ends_of_the_distribution() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for number in (0.0, 1 - 2**-53):
        assert inverse_cdf(logits, torch.tensor([number], dtype=torch.float64)).item() == 1
