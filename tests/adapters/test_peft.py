"""Equations of PEFT's tuners as a user relies on them, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig

from residency.adapters import Peft
from residency.adapters.peft import lora
from residency.core.errors import UserError
from residency.core.tensors import snapshot
from residency.mitigations import Mitigation
from residency.testing.tiny_runs import make_module, train
from support.peft_configs import CONFIGS
from support.tuned_models import EXAMPLES, attach, backbone, layer, learn, logits, merged_weight, weight

QV = ["q_proj", "v_proj"]
BASE_CHANGING = ["pissa", "pissa_niter_4", "olora"]


# -- LoRA and its initialisations -----------------------------------------------------------------------------------


def test_only_b_has_a_gradient_at_the_start_and_the_update_has_the_rank(llama: Path) -> None:
    model = attach(llama, LoraConfig(target_modules=QV, r=3))
    learn(model, steps=1, lr=0.0)
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.requires_grad}
    assert all((norm == 0.0) == (".lora_A." in name) for name, norm in norms.items())
    learn(model, steps=5)
    update = layer(model).get_delta_weight("default").detach()
    assert int(torch.linalg.matrix_rank(update, rtol=1e-5)) == 3


def test_number_of_parameters_is_the_formula(llama: Path) -> None:
    model = attach(llama, LoraConfig(target_modules="all-linear", r=4))
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]  # q, k, v, o, gate, up, down
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * sum(4 * (i + o) for i, o in sizes)


def test_rslora_scales_by_the_root_of_the_rank(llama: Path) -> None:
    scales = [
        layer(attach(llama, LoraConfig(target_modules=QV, r=9, lora_alpha=6, use_rslora=use))).scaling["default"]
        for use in (False, True)
    ]
    assert scales[0] == pytest.approx(6 / 9)
    assert scales[1] / scales[0] == pytest.approx(9**0.5)


def test_merging_and_unmerging_returns_to_the_weight(llama: Path) -> None:
    model = attach(llama, LoraConfig(target_modules=QV, r=4))
    learn(model)
    before = layer(model).base_layer.weight.detach().clone()
    model.merge_adapter()
    assert not torch.equal(layer(model).base_layer.weight, before)
    model.unmerge_adapter()
    assert float((layer(model).base_layer.weight - before).abs().max()) <= 1e-5 * float(before.abs().max())


@pytest.mark.parametrize("init", BASE_CHANGING)
def test_a_base_changing_start_adds_up_to_the_base_and_has_no_reference(init: str, llama: Path) -> None:
    adapter = lora(target_modules=QV, r=4, init_lora_weights=init)
    model, pretrained = attach(llama, adapter), weight(llama)
    adapted = layer(model)
    total = (adapted.base_layer.weight + adapted.get_delta_weight("default")).detach()
    assert float((total - pretrained).norm() / pretrained.norm()) < 1e-5
    with model.disable_adapter():
        off = logits(model)
    assert float((off - logits(backbone(llama).load())).abs().max()) > 1e-3, "the frozen weight is another one"
    with pytest.raises(UserError, match="reference"):
        adapter.reference(model)


def test_a_mitigation_that_needs_the_base_is_refused_with_pissa(llama: Path) -> None:
    class NeedsBase(Mitigation):
        requires = frozenset({"reference"})

    with pytest.raises(UserError, match=r"needs reference(.|\n)*use "):
        make_module(llama, lora(target_modules=QV, init_lora_weights="pissa"), {"x": NeedsBase()})


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_row_0_of_a_base_changing_start_is_the_base(name: str, llama: Path, tmp_path: Path) -> None:
    changed, _ = train(tmp_path / "changed", llama, Peft(config=CONFIGS[name]()), steps=1)
    plain, _ = train(tmp_path / "plain", llama, Peft(config=CONFIGS["lora"]()), steps=1)
    rows = [torch.tensor(record["scores"]["nll"]["R"][0]) for record in (changed, plain)]
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=1e-5)


def test_a_drawn_start_is_not_exported(llama: Path, tmp_path: Path) -> None:
    """PEFT draws it again when it loads, and the residual would be another one."""
    adapter = lora(target_modules=QV, r=4, init_lora_weights="pissa_niter_4")
    model = attach(llama, adapter)
    with pytest.raises(UserError, match="exportable"):
        adapter.export(model, tmp_path)
    learn(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(backbone(llama).load(), tmp_path)
    assert float((logits(loaded) - logits(model)).abs().max()) > 1e-4


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_trained_bias_takes_the_reference_away(bias: str, llama: Path) -> None:
    assert "reference" not in lora(target_modules=QV, bias=bias).provides
    assert "reference" in lora(target_modules=QV, bias="none").provides


def test_modules_to_save_leave_the_reference_alone(llama: Path) -> None:
    adapter = lora(target_modules=QV, r=4, modules_to_save=["norm"])
    model = attach(llama, adapter)
    learn(model)
    moved = next(p for n, p in model.named_parameters() if "modules_to_save" in n)
    assert moved.requires_grad
    assert not torch.equal(moved, torch.ones_like(moved))
    with adapter.reference(model):
        assert torch.equal(logits(model), logits(backbone(llama).load()))
    state = snapshot(adapter.state(model))
    assert any("modules_to_save" in name for name in adapter.weights(model, state)), "averaged with the rest"


# -- LoRA+ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [partial(torch.optim.SGD, lr=1e-3), partial(torch.optim.AdamW, lr=1e-3)])
def test_lora_plus_groups_partition_what_trains(factory: Any, llama: Path) -> None:
    adapter = Peft(config=LoraConfig(target_modules=QV, r=4, use_dora=True), lr_ratio=16.0)
    model = attach(llama, adapter)
    optimizer = adapter.optimizer(model, factory)
    slow, fast = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert fast == {id(p) for n, p in model.named_parameters() if ".lora_B." in n}
    assert slow | fast == {id(p) for p in adapter.trainable(model).values()}
    assert not slow & fast
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3 * 16.0]
    plain = Peft(config=LoraConfig(target_modules=QV, r=4)).optimizer(model, factory)
    assert len(plain.param_groups) == 1


def test_lora_plus_steps_as_far_as_it_says(llama: Path) -> None:
    steps = []
    for ratio in (1.0, 4.0):
        adapter = Peft(config=LoraConfig(target_modules=QV, r=4), lr_ratio=ratio)
        model = attach(llama, adapter)
        optimizer = adapter.optimizer(model, partial(torch.optim.SGD, lr=0.5))
        logits_ = backbone(llama).logits(model, _batch())
        logits_.logsumexp(-1).mean().backward()
        optimizer.step()
        steps.append(torch.cat([p.flatten() for n, p in model.named_parameters() if ".lora_B." in n]).detach())
    torch.testing.assert_close(steps[1], 4.0 * steps[0])


def test_lora_plus_of_a_tuner_without_b_is_refused() -> None:
    with pytest.raises(UserError, match=r"lr_ratio 16\.0 with IA3Config(.|\n)*lora_plus\.yaml"):
        Peft(config=CONFIGS["ia3"](), lr_ratio=16.0)


def _batch() -> Any:
    from residency.core.batching import make_batch

    return make_batch(EXAMPLES, layout="padded")


# -- DoRA, IA3 ------------------------------------------------------------------------------------------------------


def test_dora_magnitudes_are_the_norms_of_the_merged_rows(llama: Path) -> None:
    model = attach(llama, LoraConfig(target_modules=QV, r=4, use_dora=True))
    magnitude = layer(model).lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.detach(), weight(llama).norm(dim=1))
    learn(model)
    assert float(magnitude.grad.norm()) > 0
    expected = magnitude.detach().clone()
    torch.testing.assert_close(merged_weight(model).norm(dim=1), expected, rtol=1e-5, atol=0)


def test_dora_with_scaled_magnitudes_scales_the_layer(llama: Path) -> None:
    adapted = layer(attach(llama, LoraConfig(target_modules=QV, r=4, use_dora=True)))
    x = torch.randn(3, 32)
    with torch.no_grad():
        before = adapted(x)
        adapted.lora_magnitude_vector["default"].weight.mul_(1.7)
        torch.testing.assert_close(adapted(x), 1.7 * before)


def test_ia3_scales_rows_and_the_input_of_the_inner_layer(llama: Path) -> None:
    model = attach(llama, CONFIGS["ia3"]())
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in leaves.values()) == 2 * (16 + 16 + 64)
    assert all(torch.equal(p, torch.ones_like(p)) for p in leaves.values())
    learn(model)
    key, down = "0.self_attn.k_proj", "1.mlp.down_proj"
    rows, columns = (layer(model, name).ia3_l["default"].detach().flatten() for name in (key, down))
    plain = model.merge_and_unload()
    torch.testing.assert_close(layer(plain, key).weight.detach(), rows[:, None] * weight(llama, key))
    torch.testing.assert_close(layer(plain, down).weight.detach(), weight(llama, down) * columns)
