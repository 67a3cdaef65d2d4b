"""Prompt, prefix and P-tuning: virtual tokens in front of a row change neither whose logits are whose, nor the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from residency.adapters import Peft
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Example
from residency.testing.tiny_runs import make_module, train
from support.peft_configs import CONFIGS
from support.tuned_models import EXAMPLES, attach, backbone, learn, logits

NAMES = ["prompt_tuning", "p_tuning", "prefix_tuning", "cartridge"]
EMBEDDED = ["prompt_tuning", "p_tuning"]
names = pytest.mark.parametrize("name", NAMES)


@names
def test_the_layout_is_padded_without_being_asked(name: str, llama: Path) -> None:
    module = make_module(llama, Peft(config=CONFIGS[name]()), {})
    module.build(seed=0)
    assert module.layout == "padded"
    asked = make_module(llama, Peft(config=CONFIGS[name]()), {}, layout="packed")
    with pytest.raises(UserError, match="layout to auto or padded"):
        asked.build(seed=0)


@pytest.mark.parametrize("name", EMBEDDED)
def test_logits_are_those_of_the_row_with_the_virtual_embeddings_in_front(name: str, llama: Path) -> None:
    """Computed from the base alone: [virtual, E(x)], one row at a time, read where the completion is predicted."""
    model = attach(llama, CONFIGS[name]())
    learn(model, lr=5e-2)
    found, base = logits(model), backbone(llama).load()
    virtual = model.get_prompt(batch_size=1).detach()
    assert virtual.shape == (1, 3, 32)
    expected = []
    for example in EXAMPLES:
        ids = torch.tensor([[*example.prompt, *example.completion[:-1]]])
        with torch.no_grad():
            out = base(inputs_embeds=torch.cat([virtual, base.get_input_embeddings()(ids)], 1)).logits[0]
        expected.append(out[3 + len(example.prompt) - 1 :])
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=2e-6)


@names
def test_a_head_that_computes_every_position_gives_the_same(name: str, llama: Path, monkeypatch: Any) -> None:
    model = attach(llama, CONFIGS[name]())
    learn(model)
    few = logits(model)
    monkeypatch.setattr("residency.backbones.supervised._keeps_logits", lambda model: False)
    torch.testing.assert_close(logits(model), few, rtol=0, atol=2e-6)


@names
@pytest.mark.parametrize("together", [False, True])
def test_generation_continues_as_the_logits_say(name: str, together: bool, llama: Path) -> None:
    """Padded on the left or not: without padding a prefix once lay in the cache of an attention without a mask."""
    model, runner = attach(llama, CONFIGS[name]()), backbone(llama)
    learn(model, steps=8, lr=5e-2)
    prompts = [example.prompt for example in EXAMPLES]
    groups = [prompts] if together else [[prompt] for prompt in prompts]
    written = [ids for group in groups for ids in runner.generate(model, group, max_new_tokens=4)]
    assert written == [_greedy(model, list(prompt), 4) for prompt in prompts]


def _greedy(model: Any, ids: list[int], count: int) -> list[int]:
    start = len(ids)
    for _ in range(count):
        example = Example.of(domain="x", row="0", prompt=tuple(ids), completion=(0,))
        token = int(logits(model, examples=[example])[0].argmax())
        if token == 0:
            break
        ids.append(token)
    return ids[start:]


@names
def test_off_is_the_base_bit_for_bit_and_the_base_has_no_gradient(name: str, llama: Path) -> None:
    adapter = Peft(config=CONFIGS[name]())
    model = attach(llama, adapter)
    learn(model)
    assert all(p.grad is None for p in model.get_base_model().parameters())
    assert all(p.grad is not None for p in adapter.trainable(model).values())
    with adapter.reference(model):
        assert torch.equal(logits(model), logits(backbone(llama).load()))
        assert backbone(llama).generate(model, [(5, 6)], max_new_tokens=3) == backbone(llama).generate(
            backbone(llama).load(), [(5, 6)], max_new_tokens=3
        )


def test_a_virtual_token_is_worth_one_embedding(llama: Path) -> None:
    adapter = Peft(config=CONFIGS["prompt_tuning"]())
    model = attach(llama, adapter)
    assert [tuple(p.shape) for p in adapter.trainable(model).values()] == [(3, 32)]


def test_a_cartridge_keeps_its_first_token(llama: Path) -> None:
    model = attach(llama, CONFIGS["cartridge"]())
    learn(model)
    frozen = [name for name, p in model.named_parameters() if "prompt_encoder" in name and not p.requires_grad]
    assert frozen


def test_a_whole_stream_learns_and_generates(llama: Path, tmp_path: Path) -> None:
    record, module = train(tmp_path / "run", llama, Peft(config=CONFIGS["prefix_tuning"]()), steps=6, lr=0.1)
    matrix = record["scores"]["nll"]["R"]
    assert module.layout == "padded"
    assert all(matrix[k + 1][k] < matrix[0][k] for k in range(3)), "every domain is learned"
    assert record["scores"]["exact_match"]["R"][3][0] is not None


@pytest.mark.parametrize("name", ["prefix_tuning", "cartridge"])
def test_a_prefix_under_gradient_checkpointing_is_refused(name: str, llama: Path) -> None:
    """transformers drops the cache there, and the prefix with it."""
    model = backbone(llama, gradient_checkpointing=True).load()
    with pytest.raises(UserError, match="gradient checkpointing"):
        Peft(config=CONFIGS[name]()).attach(model)


def test_without_virtual_tokens_nothing_has_changed(llama: Path) -> None:
    """Counting columns from the end of a row is counting them from its start."""
    model, batch = backbone(llama).load(), make_batch(EXAMPLES, layout="padded")
    with torch.no_grad():
        everything = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    torch.testing.assert_close(logits(model), everything[batch.target_at], rtol=0, atol=1e-6)
