"""Equations of PEFT's tuners as a user relies on them, and what is refused."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig

from attached import EXAMPLES, attach, backbone, learn, logits
from peft_configs import CONFIGS
from residency.adapters import OSF, Peft
from residency.adapters.peft import lora
from residency.adapters.tuners import _REFUSED, _REFUSED_INITS, _REFUSED_OPTIONS
from residency.errors import UserError
from residency.layout import choose_layout
from residency.mitigations import Mitigation
from residency.tensors import snapshot
from running import make_module, train

ROOT = Path(__file__).parents[2]
QV = ["q_proj", "v_proj"]
BASE_CHANGING = ["pissa", "pissa_niter_4", "olora"]


def layer(model: Any, name: str = "layers.0.self_attn.q_proj") -> Any:
    """An adapted layer (or a plain one)."""
    return next(module for path, module in model.named_modules() if path.endswith(name))


def weight(folder: Path, name: str = "layers.0.self_attn.q_proj") -> torch.Tensor:
    """The pretrained weight, (out, in)."""
    found: torch.Tensor = layer(backbone(folder).load(), name).weight.detach()
    return found


def merged_weight(model: Any, name: str = "layers.0.self_attn.q_proj") -> torch.Tensor:
    return layer(model.merge_and_unload(), name).weight.detach()  # type: ignore[no-any-return]


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
    total = adapted.base_layer.weight + adapted.get_delta_weight("default")
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
    from residency.batching import make_batch

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


# -- rotations ------------------------------------------------------------------------------------------------------

# Tuner, how far it is trained, and how nearly it is a rotation then.
ROTATIONS: dict[str, tuple[PeftConfig, float, float]] = {
    "oft, exact": (OFTConfig(target_modules=QV, oft_block_size=8, use_cayley_neumann=False), 1e-1, 1e-5),
    "oft, series": (OFTConfig(target_modules=QV, oft_block_size=8), 1e-2, 1e-3),
    "boft": (CONFIGS["boft"](), 1e-1, 1e-5),
    "hra": (CONFIGS["hra"](), 1e-1, 1e-4),
}


@pytest.mark.filterwarnings("ignore:.*CUDA extension.*", "ignore:.*boft_n_butterfly_factor.*")
@pytest.mark.parametrize("name", ROTATIONS)
def test_a_rotation_keeps_singular_values(name: str, llama: Path) -> None:
    config, lr, tolerance = ROTATIONS[name]
    model = attach(llama, config)
    for key, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and "boft_s" not in key)  # BOFT's scale of every output is no rotation
    learn(model, lr=lr)
    before, after = weight(llama), merged_weight(model)
    assert float((after - before).norm() / before.norm()) > 0.05, "it has turned"
    torch.testing.assert_close(torch.linalg.svdvals(after), torch.linalg.svdvals(before), rtol=tolerance, atol=0)
    gram = [(w.T @ w, w @ w.T) for w in (before, after)]
    errors = [float((one - other).norm() / one.norm()) for one, other in zip(*gram, strict=True)]
    assert min(errors) < 3 * tolerance, "angles between rows or between columns stay"
    assert max(errors) > 0.05


@pytest.mark.parametrize(("series", "lr", "tolerance"), [(False, 1e-1, 1e-5), (True, 1e-2, 1e-3)])
def test_oft_matrices_are_orthogonal(series: bool, lr: float, tolerance: float, llama: Path) -> None:
    model = attach(llama, OFTConfig(target_modules=QV, oft_block_size=8, use_cayley_neumann=series))
    learn(model, lr=lr)
    rotation = layer(model).oft_R["default"].get_weight().detach()
    assert rotation.shape == (32, 32)
    error = float((rotation.T @ rotation - torch.eye(32)).abs().max())
    assert error < tolerance
    if series:
        learn(model, lr=1e-1)
        rotation = layer(model).oft_R["default"].get_weight().detach()
        assert float((rotation.T @ rotation - torch.eye(32)).abs().max()) > 1e-2, "the series does not hold far out"


# -- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_no_row_sees_another(name: str, llama: Path) -> None:
    """After training, too: at the start an adapter that leaks may still be the identity."""
    model = attach(llama, CONFIGS[name]())
    learn(model, lr=3e-2)
    together = logits(model)
    torch.testing.assert_close(torch.cat([logits(model, examples=[e]) for e in EXAMPLES]), together, rtol=0, atol=2e-6)
    layout, _ = choose_layout("auto", backbone(llama), model)
    assert (layout == "padded") == bool(model.active_peft_config.is_prompt_learning)
    torch.testing.assert_close(logits(model, layout), together, rtol=0, atol=2e-6)


def test_lily_is_refused_because_rows_see_each_other(llama: Path) -> None:
    config = peft.LilyConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="depends on its neighbours"):
        Peft(config=config)
    torch.manual_seed(0)
    model: Any = get_peft_model(backbone(llama).load(), config)  # type: ignore[arg-type]
    learn(model, steps=8, lr=5e-2)
    alone = torch.cat([logits(model, examples=[e]) for e in EXAMPLES])
    assert float((alone - logits(model)).abs().max()) > 1e-3


# -- refusals -------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "alora_invocation_tokens": [5],
    "arrow_config": peft.ArrowConfig(),
    "kasa_config": peft.KasaConfig(),
    "layer_replication": [(0, 2), (0, 2)],
    "monteclora_config": peft.MontecloraConfig(),
    "use_qalora": True,
    "velora_config": peft.VeloraConfig(init_type="batch_average_once"),
}


@pytest.mark.parametrize("option", _REFUSED_OPTIONS)
def test_an_option_that_cannot_work_is_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"LoraConfig with {option}"):
        lora(target_modules=QV, task_type="CAUSAL_LM", **{option: OPTIONS[option]})


@pytest.mark.parametrize("init", _REFUSED_INITS)
def test_an_initialisation_that_cannot_work_is_refused(init: str) -> None:
    own = {"loftq": peft.LoftQConfig, "eva": peft.EvaConfig, "corda": CordaConfig, "lora_ga": peft.LoraGAConfig}
    more = {f"{init}_config": own[init]()}
    with pytest.raises(UserError, match=f"LoraConfig with init_lora_weights {init}"):
        lora(target_modules=QV, init_lora_weights=init, **more)


def test_every_refusal_names_a_preset_that_there_is() -> None:
    fixes = [fix for _, fix in (*_REFUSED.values(), *_REFUSED_INITS.values())]
    fixes += [fix for _, _, fix in _REFUSED_OPTIONS.values()]
    named = re.findall(r"configs/[\w/]+\.yaml", " ".join(fixes))
    assert len(named) > 10
    assert all((ROOT / name).is_file() for name in named)


def test_osf_has_a_class_of_its_own() -> None:
    with pytest.raises(UserError, match=r"osf\.yaml \(residency\.adapters\.OSF\)"):
        Peft(config=peft.OSFConfig())
    assert OSF(config=peft.OSFConfig()).provides


def test_a_target_that_is_not_there_is_told(llama: Path) -> None:
    with pytest.raises(UserError, match=r"no_such_layer(.|\n)*target_modules"):
        attach(llama, LoraConfig(target_modules=["no_such_layer"]))
