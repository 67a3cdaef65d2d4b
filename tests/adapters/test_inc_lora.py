"""IncLoRA and O-LoRA: blocks that are summed, a penalty that acts, and numbers that tell when it only shrinks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from residency.adapters import IncLoRA
from residency.adapters.algebra.orthogonality import Orthogonality, overlap, squared_cosine
from residency.core.errors import UserError
from residency.testing.tiny_runs import train
from support.stages_without_trainer import go, observing, stage
from support.tuned_models import attach, backbone, learn, logits

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def inc_lora(kind: str = "llama", penalty: Orthogonality | None = None, **options: Any) -> IncLoRA:
    more = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    return IncLoRA(
        config=LoraConfig(target_modules=TARGETS[kind], r=3, lora_alpha=6, **more, **options), penalty=penalty
    )


def factor(model: Any, letter: str, block: int) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if f"lora_{letter}.block{block:03d}" in name]


def test_overlap_in_closed_form() -> None:
    old, new = torch.tensor([[1.0, 0, 0], [0, 2, 0]]), torch.tensor([[3.0, -1, 5]])
    assert float(overlap(new, old, norm="l1")) == 3 + 2
    assert float(overlap(new, old, norm="l2sq")) == 9 + 4
    assert float(squared_cosine(new, old)) == pytest.approx((9 / 35 + 1 / 35) / 2)


@pytest.mark.parametrize("norm", ["l1", "l2sq"])
def test_outside_of_the_old_span_there_is_no_penalty(norm: Any) -> None:
    torch.manual_seed(0)
    old, new = torch.randn(4, 16), torch.randn(3, 16)
    basis = torch.linalg.qr(old.T).Q
    free = new - new @ basis @ basis.T
    assert float(overlap(free, old, norm=norm)) < 1e-4
    assert float(squared_cosine(free, old)) < 1e-10
    assert float(overlap(new, old, norm=norm)) > 1


def test_a_small_block_is_no_orthogonal_one() -> None:
    """Half of the penalty may be half of the block: the cosine does not move then."""
    torch.manual_seed(0)
    old, new = torch.randn(4, 16), torch.randn(3, 16)
    assert overlap(new / 100, old, norm="l1") < overlap(new, old, norm="l1") / 50
    torch.testing.assert_close(squared_cosine(new / 100, old), squared_cosine(new, old))


def test_penalty_is_zero_for_the_first_block_and_positive_from_the_second(llama: Path) -> None:
    adapter = inc_lora(penalty=Orthogonality())
    model = attach(llama, adapter)
    adapter.begin_stage(model, stage(0), observing(model))
    assert adapter.loss_terms(model, stage(0))["orthogonality"].item() == 0
    assert "cos2" not in adapter.metrics_to_log(model, stage(0))
    adapter.begin_stage(model, stage(1), observing(model))
    assert adapter.loss_terms(model, stage(1))["orthogonality"].item() > 0
    assert adapter.metrics_to_log(model, stage(1))["norm_b"] == 0


def test_the_penalty_pulls_at_the_newest_a_alone(llama: Path) -> None:
    adapter = inc_lora(penalty=Orthogonality(shrinkage=0.0))
    model = go(attach(llama, adapter), adapter, 2, train=False)
    sum(adapter.loss_terms(model, stage(1)).values()).backward()  # type: ignore[union-attr]
    assert all(a.grad is not None and a.grad.abs().sum() > 0 for a in factor(model, "A", 1))
    assert all(p.grad is None for p in [*factor(model, "B", 1), *factor(model, "A", 0), *factor(model, "B", 0)])


def test_shrinkage_is_the_sum_of_plain_norms(llama: Path) -> None:
    adapter = inc_lora(penalty=Orthogonality(strength=0.0, shrinkage=0.5))
    model = go(attach(llama, adapter), adapter, 2)
    expected = 0.5 * sum(p.norm().item() for p in [*factor(model, "A", 1), *factor(model, "B", 1)])
    terms = adapter.loss_terms(model, stage(1))
    assert {*terms} == {"shrinkage"}
    assert terms["shrinkage"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_only_the_newest_block_trains_and_all_take_part(kind: str, request: pytest.FixtureRequest) -> None:
    adapter = inc_lora(kind)
    model = go(attach(request.getfixturevalue(kind), adapter), adapter, 3)
    assert {*adapter.trainable(model)} == {name for name, _ in model.named_parameters() if ".block002." in name}
    with_all = logits(model)
    for block in range(3):
        kept = [b.detach().clone() for b in factor(model, "B", block)]
        with torch.no_grad():
            for b in factor(model, "B", block):
                b.zero_()
        assert not torch.equal(logits(model), with_all), f"block {block} is not in the forward pass"
        with torch.no_grad():
            for b, old in zip(factor(model, "B", block), kept, strict=True):
                b.copy_(old)


def test_the_switch_leaves_gradients_as_they_were(llama: Path) -> None:
    """PEFT's own switch makes all active blocks trainable when it is left."""
    adapter = inc_lora()
    model = go(attach(llama, adapter), adapter, 2)
    before = {*adapter.trainable(model)}
    with adapter.reference(model), adapter.reference(model):
        off = logits(model)
    assert torch.equal(off, logits(backbone(llama).load()))
    assert {*adapter.trainable(model)} == before
    assert not torch.equal(logits(model), off)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_blocks_side_by_side_are_one_wide_lora(
    kind: str, rslora: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    adapter = inc_lora(kind, use_rslora=rslora)
    model = go(attach(folder, adapter), adapter, 3)
    adapter.export(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 9
    loaded = PeftModel.from_pretrained(backbone(folder).load(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


def test_a_mixture_of_before_and_after_is_held_exactly(llama: Path) -> None:
    adapter = inc_lora()
    model = go(attach(llama, adapter), adapter, 1)
    before = {name: tensor.clone() for name, tensor in adapter.weights(model, adapter.state(model)).items()}
    frozen = [b.detach().clone() for b in factor(model, "B", 0)]
    adapter.begin_stage(model, stage(1), observing(model))
    learn(model)
    after = {name: tensor.clone() for name, tensor in adapter.weights(model, adapter.state(model)).items()}
    mixture = {name: 0.7 * before[name] + 0.3 * after[name] for name in after}
    assert adapter.load_weights(model, mixture)["truncation"] < 1e-5
    for name, tensor in adapter.weights(model, adapter.state(model)).items():
        torch.testing.assert_close(tensor, mixture[name], rtol=0, atol=1e-6)
    assert all(torch.equal(b, old) for b, old in zip(factor(model, "B", 0), frozen, strict=True))


def test_strength_zero_is_inc_lora_and_the_penalty_turns_the_block(llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "kinds": {"a": "generative", "b": "generative"},
        "steps": 6,
        "trainer": {"log_every_n_steps": 1},
    }
    plain, _ = train(tmp_path / "plain", llama, inc_lora(), **options)
    zero, _ = train(tmp_path / "zero", llama, inc_lora(penalty=Orthogonality(strength=0.0)), **options)
    o_lora, _ = train(tmp_path / "o", llama, inc_lora(penalty=Orthogonality(strength=1.0)), **options)
    assert zero["scores"] == plain["scores"]
    assert o_lora["scores"]["nll"]["R"][:2] == plain["scores"]["nll"]["R"][:2]
    lines = [
        [json.loads(x) for x in (tmp_path / run / "history.jsonl").read_text().splitlines()] for run in ("plain", "o")
    ]
    assert "loss/adapter/orthogonality" not in lines[0][-1]
    assert lines[1][0]["loss/adapter/orthogonality"] == 0
    assert lines[1][6]["loss/adapter/orthogonality"] > lines[1][-1]["loss/adapter/orthogonality"] > 0
    assert lines[1][-1]["adapter/cos2"] < 0.7 * lines[0][-1]["adapter/cos2"]
    assert lines[1][-1]["adapter/norm_a"] > 0


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"bias": "all"}, {"lora_bias": True}], ids=str
)
def test_what_is_no_sum_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"not such a sum.*\n.*use plain LoRA"):
        inc_lora(**options)
