"""Source shielding: frozen columns are frozen bit for bit, decay included, in weights and in LoRA's updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from residency.adapters import Adapter, Full
from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Example, Stage
from residency.engine.module import ContinualModule
from residency.mitigations import SourceShielding
from residency.mitigations.constraints.linear_maps import layer_weight, linear_maps
from residency.mitigations.constraints.shield_scores import (
    column_scores,
    fisher_columns,
    frozen_columns,
    input_squares,
    own_text,
    score_layers,
)
from residency.mitigations.constraints.source_shielding import shield_factors
from residency.objectives import SFT
from residency.testing.tiny_runs import domains, train

STAGE = Stage(index=0, domain="a", stages=2, seed=0, steps=1, batch_size=1)
EXAMPLES = [
    Example.of(domain="a", row=str(k), prompt=tuple(range(5 + k, 9 + 2 * k)), completion=(40 + k, 50, 0))
    for k in range(4)
]
MADE: dict[str, Callable[[], Adapter]] = {
    "full": Full,
    "lora": lambda: lora(target_modules="all-linear", r=4),
    "pissa": lambda: lora(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights="pissa"),
}


def build(folder: Path, adapter: str = "full", **options: Any) -> tuple[ContinualModule, SourceShielding]:
    shielding = SourceShielding(**{"samples": 3, "tokens": 8, **options})
    module = ContinualModule(
        backbone=CausalLM(path=str(folder)), adapter=MADE[adapter](), objective=SFT(), mitigations={"ssu": shielding}
    )
    module.build(seed=0)
    return module, shielding


def step(module: ContinualModule, shielding: SourceShielding, steps: int = 3) -> None:
    """AdamW with decay; every update goes through the mitigation."""
    leaves = module.adapter.trainable(module.model)
    optimizer = torch.optim.AdamW(list(leaves.values()), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        SFT()(module.forward, make_batch(EXAMPLES, layout=module.layout), None).loss.backward()
        before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        optimizer.step()
        with torch.no_grad():
            after = {name: leaf.detach().clone() for name, leaf in leaves.items()}
            for name, tensor in shielding.transform_update(module, before, after).items():
                leaves[name].copy_(tensor)


# --- scores -----------------------------------------------------------------------------------------------------------


def weight_and_inputs() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(5, 7, generator=draw), torch.randn(30, 7, generator=draw)


@pytest.mark.parametrize("score", ["wanda_paper", "ssu_repo", "magnitude"])
def test_scores_are_their_formulas(score: Any) -> None:
    w, x = weight_and_inputs()
    wanted = {
        "wanda_paper": [sum(abs(w[i, j]) * x[:, j].norm() for i in range(5)) for j in range(7)],
        "ssu_repo": [w[:, j].norm() * (x[:, j] ** 2).mean() for j in range(7)],
        "magnitude": [w[:, j].abs().sum() for j in range(7)],
    }
    found = column_scores(w, x.square().sum(0), len(x), score=score)
    torch.testing.assert_close(found, torch.stack([torch.as_tensor(s) for s in wanted[score]]))
    permuted = column_scores(w[torch.randperm(5)], x.square().sum(0), len(x), score=score)
    torch.testing.assert_close(permuted, found)


@pytest.mark.parametrize(("score", "power"), [("wanda_paper", 1), ("ssu_repo", 2), ("magnitude", 0)])
def test_a_score_follows_the_size_of_its_feature(score: Any, power: int) -> None:
    w, x = weight_and_inputs()
    larger = x * torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    ratio = column_scores(w, larger.square().sum(0), 30, score=score) / column_scores(
        w, x.square().sum(0), 30, score=score
    )
    torch.testing.assert_close(ratio, torch.tensor([1.0, 3.0**power, 1.0, 1.0, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.29, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("width", [1, 7, 10, 100])
def test_the_largest_are_frozen_and_so_many(ratio: float, width: int) -> None:
    scores = torch.rand(width, generator=torch.Generator().manual_seed(width))
    mask = frozen_columns(scores, ratio)
    assert int(mask.sum()) == math.floor(round(ratio * width, 9))
    if mask.any() and not mask.all():
        assert scores[mask].min() > scores[~mask].max()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_scores_of_a_model_are_over_input_features(architecture: str, request: pytest.FixtureRequest) -> None:
    """Against hooks and matrices written out; GPT-2 stores them transposed."""
    module, _ = build(request.getfixturevalue(architecture))
    places = linear_maps(module.model, module.adapter.trainable(module.model))
    layers = [p.layer for p in places.values()]
    found = score_layers(module, layers, EXAMPLES, score="wanda_paper", seed=0)
    for name, place in places.items():
        seen: list[Tensor] = []
        owner = module.model.get_submodule(place.layer)
        hook = owner.register_forward_pre_hook(lambda m, x, seen=seen: seen.append(x[0].detach().flatten(0, -2)))
        for example in EXAMPLES:
            module.model.eval()
            module.forward(make_batch([example], layout=module.layout))
        hook.remove()
        x = torch.cat(seen)
        w = dict(module.model.named_parameters())[name].detach()
        w = w.T if architecture == "gpt2" else w
        assert w.shape[1] == x.shape[1] == len(found[place.layer])
        torch.testing.assert_close(found[place.layer], w.abs().sum(0) * x.norm(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_fisher_columns_are_squared_per_example(adapter: str, llama: Path) -> None:
    """The same for frozen weights under LoRA as for trained ones."""
    module, _ = build(llama, adapter)
    places = linear_maps(module.model, module.adapter.trainable(module.model))
    layers = sorted({p.layer for p in places.values()})
    found = fisher_columns(module, layers, EXAMPLES)
    full, _ = build(llama, "full")
    parameters = dict(full.model.named_parameters())
    for layer in layers[:4]:
        weight = parameters[layer.removeprefix("base_model.model.") + ".weight"]
        wanted = torch.zeros(weight.shape[1])
        for example in EXAMPLES:
            loss = SFT()(full.forward, make_batch([example], layout="packed"), None).loss * len(example.completion)
            wanted += torch.autograd.grad(loss, weight)[0].square().sum(0) / len(EXAMPLES)
        torch.testing.assert_close(found[layer], wanted, rtol=1e-3, atol=1e-7)
    assert all(p.grad is None for p in module.model.parameters())


def test_random_columns_are_drawn_by_the_seed(llama: Path) -> None:
    module, _ = build(llama)
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    one, same, other = (score_layers(module, layers, [], score="random", seed=s) for s in (0, 0, 1))
    assert all(torch.equal(one[n], same[n]) and not torch.equal(one[n], other[n]) for n in layers)
    assert not torch.equal(*one.values())


def test_input_squares_count_tokens(llama: Path) -> None:
    module, _ = build(llama)
    from residency.mitigations.constraints.linear_maps import passes

    found = input_squares(module.model, ["model.layers.0.mlp.up_proj"], passes(module, EXAMPLES))
    assert [tokens for _, tokens in found.values()] == [sum(len(e) - 1 for e in EXAMPLES)]


# --- freezing ---------------------------------------------------------------------------------------------------------


def test_a_gradient_mask_leaks_by_decay_and_an_update_mask_does_not() -> None:
    """C10: 12,208 cosine steps of AdamW at 5e-5 with weight decay 0.01 and 5 % warm-up."""
    steps, frozen = 12_208, torch.tensor([True, False])
    left = {}
    for masked in ("gradient", "update"):
        weight = torch.ones(1, 2, dtype=torch.float64)
        optimizer = torch.optim.AdamW([weight], lr=5e-5, weight_decay=0.01)
        for k in range(steps):
            warm = 0.05 * steps
            rate = k / warm if k < warm else 0.5 * (1 + math.cos(math.pi * (k - warm) / (steps - warm)))
            optimizer.param_groups[0]["lr"] = 5e-5 * rate
            weight.grad = torch.tensor([[0.0 if masked == "gradient" else 1.0, 1.0]], dtype=torch.float64)
            before = weight.clone()
            optimizer.step()
            if masked == "update":
                weight.copy_(torch.where(frozen, before, weight))
        left[masked] = float(weight[0, 0])
    assert 1 - left["gradient"] == pytest.approx(0.0030, abs=1e-4)
    assert left["update"] == 1.0


@pytest.mark.parametrize("ratio", [0.5, 1.0])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_frozen_columns_of_weights_do_not_move(architecture: str, ratio: float, request: pytest.FixtureRequest) -> None:
    module, shielding = build(request.getfixturevalue(architecture), ratio=ratio)
    shielding.on_domain_start(module, STAGE)
    start = {n: p.detach().clone() for n, p in module.model.named_parameters()}
    step(module, shielding)
    places = linear_maps(module.model, start)
    masks: Any = shielding.state["frozen"]
    assert {*masks} == {p.layer for p in places.values()}
    for name, parameter in module.model.named_parameters():
        if name not in places:
            assert not torch.equal(parameter, start[name]), "embeddings, norms and biases are trained"
            continue
        mask = masks[places[name].layer]
        assert int(mask.sum()) == math.floor(ratio * len(mask))
        old, new = (places[name].by_input(t.detach()) for t in (start[name], parameter))
        assert torch.equal(new[mask], old[mask])
        assert not bool((new[~mask] == old[~mask]).all(-1).any())
    assert shielding.metrics_to_log(module)["frozen"] == pytest.approx(ratio, abs=0.02)


def test_an_untied_head_is_trained(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(llama)
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
    module, shielding = build(tmp_path)
    shielding.on_domain_start(module, STAGE)
    assert "lm_head.weight" in module.adapter.trainable(module.model)
    masks: Any = shielding.state["frozen"]
    assert masks
    assert "lm_head" not in masks


@pytest.mark.parametrize("adapter", ["lora", "pissa"])
def test_frozen_columns_of_an_adapted_weight_do_not_move(adapter: str, llama: Path) -> None:
    """W + s B A in frozen columns, from the first step on and in a second domain with a new optimizer."""
    module, shielding = build(llama, adapter)
    shielding.on_domain_start(module, STAGE)
    masks: Any = shielding.state["frozen"]
    start = {layer: layer_weight(module.model, layer) for layer in masks}
    for _ in range(2):
        step(module, shielding)
        for layer, mask in masks.items():
            now = layer_weight(module.model, layer)
            if adapter == "lora":
                assert torch.equal(now[:, mask], start[layer][:, mask])
            torch.testing.assert_close(now[:, mask], start[layer][:, mask], rtol=0, atol=1e-6)
            assert float((now - start[layer])[:, ~mask].abs().max()) > 1e-4


def test_the_function_is_as_it_was_after_columns_of_a_are_zeroed(llama: Path) -> None:
    """A first update of size 0 zeroes the columns, and no logit changes by a bit."""
    module, shielding = build(llama, "lora")
    shielding.on_domain_start(module, STAGE)
    leaves = module.adapter.trainable(module.model)
    module.model.eval()
    batch = make_batch(EXAMPLES, layout=module.layout)
    before = {n: p.detach().clone() for n, p in leaves.items()}
    with torch.no_grad():
        old = module.forward(batch)
        for name, tensor in shielding.transform_update(module, before, before).items():
            leaves[name].copy_(tensor)
        assert torch.equal(module.forward(batch), old)
    masks: Any = shielding.state["frozen"]
    for name, place in linear_maps(module.model, leaves).items():
        if place.kind == "A":
            assert not leaves[name][:, masks[place.layer]].any()
            assert bool(leaves[name][:, ~masks[place.layer]].any())


@pytest.mark.parametrize("columns", [1, 2, 3, 8])
def test_factors_that_are_not_zero_at_the_start(columns: int) -> None:
    """Few frozen columns leave B some directions; r of them leave none. Free columns move in both."""
    draw = torch.Generator().manual_seed(0)
    a, b, da, db = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((3, 10), (6, 3), (3, 10), (6, 3)))
    frozen = torch.arange(10) < columns
    new_a, new_b = shield_factors((a, b), (a + da, b + db), frozen)
    torch.testing.assert_close((new_b @ new_a)[:, frozen], (b @ a)[:, frozen])
    assert torch.equal(new_a[:, frozen], a[:, frozen])
    assert torch.equal(new_a[:, ~frozen], (a + da)[:, ~frozen])
    assert torch.equal(new_b, b) == (columns >= 3)


def test_rounding_errors_of_zero_do_not_stop_b() -> None:
    """What a mixing mitigation leaves in zero columns when it factorises anew."""
    a = torch.ones(2, 4)
    a[:, :2] = 1e-9
    b = torch.ones(3, 2)
    new_a, new_b = shield_factors((a, b), (a + 1, b + 1), torch.tensor([True, True, False, False]))
    assert torch.equal(new_b, b + 1)
    assert not new_a[:, :2].any()


def test_off_and_first_domain(llama: Path) -> None:
    module, shielding = build(llama, ratio=0.0)
    shielding.on_domain_start(module, STAGE)
    after = {"x": torch.ones(1)}
    assert shielding.transform_update(module, after, after) is after
    assert not shielding.touches_training(0)
    assert SourceShielding().touches_training(0)


# --- what stands for the source ---------------------------------------------------------------------------------------


def test_own_text_is_drawn_by_the_seed_and_disturbs_no_other_draw(llama: Path) -> None:
    module, _ = build(llama)
    module.model.train()
    before = torch.get_rng_state()
    one, same, other = (own_text(module, samples=4, tokens=6, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert one == same != other
    assert module.model.training
    assert len({e.completion for e in one}) > 1
    assert all(len(e.prompt) == 1 and 1 <= len(e.completion) <= 6 for e in one)


def test_a_domain_can_stand_for_the_source(llama: Path, tmp_path: Path) -> None:
    found = domains(tmp_path, {"a": "generative", "b": "generative"})
    kinds = [SourceShielding(calibration=d, samples=4) for d in found.values()]
    assert len({k.fingerprint() for k in [*kinds, SourceShielding()]}) == 3
    module, _ = build(llama)
    drawn = kinds[0]._source(module, STAGE)
    rows = {row.id for row in found["a"].rows("train")}
    assert len(drawn) == 4
    assert {e.row for e in drawn} <= rows
    masks = []
    for kind in kinds:
        kind.on_domain_start(module, STAGE)
        masks.append(kind.state["frozen"])
    assert any(not torch.equal(masks[0][n], masks[1][n]) for n in masks[0])  # type: ignore[index]


def test_a_later_domain_keeps_the_mask(llama: Path, tmp_path: Path) -> None:
    """Over a stream: new blocks of IncLoRA are frozen in the same columns."""
    from peft import LoraConfig

    from residency.adapters import IncLoRA

    shielding = SourceShielding(samples=3, tokens=8)
    adapter = IncLoRA(config=LoraConfig(target_modules=["q_proj"], r=3))
    _, module = train(tmp_path / "run", llama, adapter, {"ssu": shielding}, steps=2, kinds={"a": "label", "b": "label"})
    masks: Any = shielding.state["frozen"]
    weights = module.adapter.weights(module.model, module.adapter.state(module.model))
    for layer, mask in masks.items():
        assert not weights[layer][:, mask].any()
        assert bool(weights[layer][:, ~mask].any())


@pytest.mark.parametrize("options", [{"ratio": 1.1}, {"ratio": -0.1}, {"samples": 0}, {"tokens": 0}], ids=str)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        SourceShielding(**options)
