"""SLAO: the merged pair answers, the tuned pair goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from residency.adapters import SLAO
from residency.adapters.slao import merge_weight, orthonormal_rows, step_towards
from support.stages_without_trainer import observing, stage
from support.tuned_models import attach, backbone, learn, logits

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_proj"]}


def slao(kind: str = "llama", **options: Any) -> SLAO:
    more = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    return SLAO(config=LoraConfig(target_modules=TARGETS[kind], r=3, lora_alpha=6, **more), **options)


def pair(model: Any, which: str) -> dict[str, torch.Tensor]:
    """Tensors of one pair, by their name without the pair's."""
    return {
        name.replace(f".{which}.", "."): p.detach().clone()
        for name, p in model.named_parameters()
        if f".{which}." in name
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def domain(model: Any, adapter: SLAO, index: int) -> None:
    adapter.begin_stage(model, stage(index), observing(model))
    learn(model)
    adapter.end_stage(model, stage(index), observing(model))


def test_weights_of_the_merge() -> None:
    assert [merge_weight(i, decay=0.5) for i in (1, 4, 9)] == pytest.approx([1, 1 / 2, 1 / 3])
    assert [merge_weight(i, decay=0.0) for i in (1, 4, 9)] == [1, 1, 1]
    old, new = torch.tensor([1.0, 2]), torch.tensor([3.0, 2])
    assert step_towards(old, new, weight=0.25).tolist() == [1.5, 2]
    assert step_towards(old, new, weight=1.0) is new
    assert torch.equal(step_towards(new, new, weight=0.577), new), "nothing new, nothing moves"


def test_orthonormal_rows_span_the_same_and_keep_the_sign() -> None:
    a = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    q = orthonormal_rows(a)
    torch.testing.assert_close(q @ q.T, torch.eye(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(a @ q.T @ q, a, rtol=0, atol=1e-5)
    assert ((a @ q.T).diagonal() > 0).all(), "R has a positive diagonal"
    torch.testing.assert_close(orthonormal_rows(q), q, rtol=0, atol=1e-6)


def test_after_the_first_domain_the_merged_pair_is_the_tuned_one(llama: Path) -> None:
    adapter = slao()
    model = attach(llama, adapter)
    domain(model, adapter, 0)
    assert equal(pair(model, "merged"), pair(model, "tuned"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_domain_in_closed_form(kind: str, request: pytest.FixtureRequest) -> None:
    adapter = slao(kind)
    model = attach(request.getfixturevalue(kind), adapter)
    domain(model, adapter, 0)
    size = sum(tensor.numel() for tensor in adapter.state(model).values())
    first, tuned = pair(model, "merged"), pair(model, "tuned")
    adapter.begin_stage(model, stage(1), observing(model))
    begun = pair(model, "tuned")
    for name, tensor in begun.items():
        expected = orthonormal_rows(tuned[name]) if "lora_A" in name else tuned[name]
        assert torch.equal(tensor, expected)
    assert {*adapter.trainable(model)} == {n for n, _ in model.named_parameters() if ".tuned." in n}
    learn(model)
    assert equal(pair(model, "merged"), first), "frozen until the domain is over"
    adapter.end_stage(model, stage(1), observing(model))
    tuned, merged = pair(model, "tuned"), pair(model, "merged")
    for name, tensor in merged.items():
        mean = first[name] + 2**-0.5 * (tuned[name] - first[name])
        torch.testing.assert_close(tensor, tuned[name] if "lora_A" in name else mean, rtol=0, atol=1e-7)
    assert not equal(merged, tuned)
    assert sum(tensor.numel() for tensor in adapter.state(model).values()) == size, "memory does not grow"


def test_without_decay_it_is_one_lora_continued(llama: Path) -> None:
    adapter = slao(decay=0.0)
    model = attach(llama, adapter)
    for index in range(3):
        domain(model, adapter, index)
        assert equal(pair(model, "merged"), pair(model, "tuned"))


def test_who_answers_is_part_of_the_state(llama: Path, tmp_path: Path) -> None:
    adapter = slao()
    model = attach(llama, adapter)
    domain(model, adapter, 0)
    adapter.begin_stage(model, stage(1), observing(model))
    learn(model)
    training, inside = logits(model), {k: v.clone() for k, v in adapter.state(model).items()}
    adapter.end_stage(model, stage(1), observing(model))
    scored, after = logits(model), {k: v.clone() for k, v in adapter.state(model).items()}
    assert not torch.equal(training, scored), "the merged pair is what is scored"
    adapter.load_state(model, inside)
    assert torch.equal(logits(model), training)
    adapter.load_state(model, after)
    assert torch.equal(logits(model), scored)
    adapter.export(model, tmp_path)
    loaded = PeftModel.from_pretrained(backbone(llama).load(), tmp_path)
    torch.testing.assert_close(logits(loaded), scored, rtol=0, atol=1e-6)
