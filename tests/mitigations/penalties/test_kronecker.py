"""Penalties on a low-rank update in weight space (C7), and the factors they are made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from residency.adapters import Full
from residency.adapters.base import LowRankLayer
from residency.adapters.peft import Peft, lora
from residency.backbones import CausalLM
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree, save_tree
from residency.core.types import Example, Layout, Stage
from residency.engine.module import ContinualModule
from residency.mitigations import KroneckerEWC
from residency.mitigations.penalties.ewc_kfac import merge_factors
from residency.mitigations.penalties.fisher import data_losses
from residency.mitigations.penalties.kronecker import kronecker_factors, low_rank_pull, low_rank_pulls
from residency.mitigations.penalties.sampling import unpack_facts
from residency.objectives import SFT
from residency.testing.tiny_runs import train

OUT, IN, RANK = 5, 7, 2


def factors(seed: int) -> tuple[Tensor, Tensor]:
    """B and A."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((OUT, RANK), (RANK, IN))
    b, a = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return b, a


def covariance(size: int, seed: int) -> Tensor:
    """Symmetric, not negative, singular."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(size - 2, size, generator=draw, dtype=torch.float64)
    return x.T @ x


def dense(b: Tensor, a: Tensor, old_b: Tensor, old_a: Tensor, scale: float, inputs: Tensor, outputs: Tensor) -> Tensor:
    """½ vec(ΔW - ΔW*)ᵀ (Ā ⊗ Ḡ) vec(ΔW - ΔW*), with columns stacked."""
    vec = (scale * (b @ a - old_b @ old_a)).T.reshape(-1)
    return 0.5 * vec @ torch.kron(inputs, outputs) @ vec


def test_low_rank_penalty_is_the_dense_one_with_its_gradient() -> None:
    (b, a), (old_b, old_a) = factors(0), factors(1)
    inputs, outputs = covariance(IN, 2), covariance(OUT, 3)
    b.requires_grad_()
    a.requires_grad_()
    wanted = dense(b, a, old_b, old_a, 1.7, inputs, outputs)
    with torch.no_grad():
        value, pull_b, pull_a = low_rank_pull(b, a, old_b, old_a, scale=1.7, inputs=inputs, outputs=outputs)
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-10, atol=0)
    for pull, gradient in zip((pull_b, pull_a), torch.autograd.grad(wanted, (b, a)), strict=True):
        torch.testing.assert_close(pull, gradient, rtol=1e-10, atol=1e-10)


def test_towards_zero_it_is_the_trace_of_small_products() -> None:
    """C7: ½ s² tr[(Bᵀ Ḡ B)(A Ā Aᵀ)]."""
    (b, a), inputs, outputs = factors(0), covariance(IN, 2), covariance(OUT, 3)
    zero = torch.zeros_like
    value, _, _ = low_rank_pull(b, a, zero(b), a, scale=0.5, inputs=inputs, outputs=outputs)
    wanted = 0.5 * 0.25 * torch.trace((b.T @ outputs @ b) @ (a @ inputs @ a.T))
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(value, dense(b, a, zero(b), a, 0.5, inputs, outputs), rtol=1e-12, atol=0)


def test_without_factors_it_is_the_distance_of_updates() -> None:
    (b, a), (old_b, old_a) = factors(0), factors(1)
    value, _, _ = low_rank_pull(b, a, old_b, old_a, scale=3.0)
    torch.testing.assert_close(value, 0.5 * (3 * (b @ a - old_b @ old_a)).square().sum(), rtol=1e-12, atol=0)


def test_it_is_nothing_at_the_anchor_and_in_every_gauge() -> None:
    (b, a), inputs, outputs = factors(0), covariance(IN, 2), covariance(OUT, 3)
    value, pull_b, pull_a = low_rank_pull(b, a, b, a, scale=1.0, inputs=inputs, outputs=outputs)
    assert float(value) == 0
    assert not pull_b.any()
    assert not pull_a.any()
    gauge = torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    value, _, _ = low_rank_pull(b @ gauge, torch.linalg.solve(gauge, a), b, a, scale=1.0)
    assert abs(float(value)) < 1e-12


def test_pulls_of_layers_are_summed_and_named() -> None:
    layers = [LowRankLayer(path=p, a=f"{p}.A", b=f"{p}.B", scale=s) for p, s in (("x", 1.0), ("y", 2.0))]
    leaves, anchor = {}, {}
    for k, layer in enumerate(layers):
        leaves[layer.b], leaves[layer.a] = factors(k)
        anchor[layer.b], anchor[layer.a] = factors(10 + k)
    value, pulls = low_rank_pulls(layers, leaves, anchor, strength=3.0)
    single = [low_rank_pull(leaves[y.b], leaves[y.a], anchor[y.b], anchor[y.a], scale=y.scale) for y in layers]
    assert float(value) == pytest.approx(3 * sum(float(v) for v, _, _ in single), rel=1e-5)
    torch.testing.assert_close(pulls["y.B"].double(), 3 * single[1][1], rtol=1e-4, atol=1e-4)
    assert {*pulls} == {*leaves}


def test_merged_factors_of_domains_that_agree_are_exact() -> None:
    a, g, other = covariance(IN, 0), covariance(OUT, 1), covariance(OUT, 2)
    inputs, outputs, weight = merge_factors(({"x": a}, {"x": g}, 1.0), ({"x": a}, {"x": other}), decay=0.5)
    torch.testing.assert_close(torch.kron(inputs["x"], outputs["x"]), torch.kron(a, 0.5 * g + other))
    assert weight == 1.5
    # Equal in Ḡ instead: Ā is the mean by weight, a third of it the older domain's.
    inputs, outputs, _ = merge_factors(({"x": a}, {"x": g}, 1.0), ({"x": covariance(IN, 3)}, {"x": g}), decay=0.5)
    wanted = torch.kron(0.5 * a + covariance(IN, 3), g)
    torch.testing.assert_close(torch.kron(inputs["x"], outputs["x"]), wanted)


# --- in a language model ----------------------------------------------------------------------------------------------

EXAMPLES = [
    Example.of(domain="d", row=str(k), prompt=tuple(range(5 + k, 8 + 2 * k)), completion=tuple(range(5, 6 + k)))
    for k in range(6)
]


def build(folder: Path, layout: Layout = "packed", **mitigations: KroneckerEWC) -> ContinualModule:
    parts = {"backbone": CausalLM(path=str(folder)), "adapter": lora(target_modules="all-linear", r=2)}
    module = ContinualModule(**parts, objective=SFT(), mitigations=dict(mitigations), layout=layout)
    module.build(seed=0)
    move(module, 1)
    return module


def move(module: ContinualModule, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in module.adapter.trainable(module.model).values():
            leaf += 0.05 * torch.randn(leaf.shape, generator=draw)


def finish(module: ContinualModule, index: int = 0) -> None:
    stage = Stage(index=index, domain="d", stages=3, seed=0, steps=1, batch_size=6)
    module.begin_stage(stage, EXAMPLES)
    for mitigation in module.mitigations.values():
        mitigation.on_domain_end(module, stage)


def owners(module: ContinualModule) -> dict[str, nn.Module]:
    return {y.path: module.model.get_submodule(y.path) for y in module.adapter.low_rank_layers(module.model)}


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_factors_by_brute_force(layout: Layout, llama: Path) -> None:
    """One example at a time in the layer's own terms; any grouping gives the same."""
    module = build(llama, layout)
    losses, layers = data_losses(module.forward), owners(module)
    groups = [EXAMPLES[:1], EXAMPLES[1:4], EXAMPLES[4:]]
    shared, inputs, outputs = kronecker_factors(layers, [make_batch(g, layout=layout) for g in groups], losses)
    path = next(p for p in layers if p.endswith("1.self_attn.v_proj"))
    xx, gg, tokens = torch.zeros_like(inputs[shared[path]]), torch.zeros_like(outputs[path]), 0
    for example in EXAMPLES:
        seen: list[Tensor] = []
        hook = layers[path].register_forward_hook(lambda m, args, y, seen=seen: seen.extend((args[0], y)))
        loss = losses(make_batch([example], layout="padded")).sum()
        hook.remove()
        x, g = seen[0][0], torch.autograd.grad(loss, seen[1])[0][0]
        xx, gg, tokens = xx + x.T @ x, gg + g.T @ g, tokens + len(x)
    torch.testing.assert_close(inputs[shared[path]], (xx / tokens).detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(outputs[path], gg / len(EXAMPLES), rtol=1e-3, atol=1e-7)
    assert shared[path].endswith("1.self_attn.q_proj"), "q, k and v read one tensor and share one matrix"
    assert len(inputs) == 2 * 4
    assert len(outputs) == 2 * 7


def test_penalty_in_a_model(llama: Path, tmp_path: Path) -> None:
    """Nothing before a domain ends, 0 at the anchor, λ-linear, growing as the weights leave, stored exactly."""
    module = build(llama, on=KroneckerEWC(strength=5.0), off=KroneckerEWC(strength=0.0))
    on, off = (module.mitigations[name] for name in ("on", "off"))
    ones = {name: torch.ones_like(leaf) for name, leaf in module.adapter.trainable(module.model).items()}
    assert on.loss_terms(module, None, None) == {}
    assert on.transform_gradients(module, ones) is ones
    finish(module)
    assert float(on.loss_terms(module, None, None)["penalty"]) == 0
    move(module, 2)
    value = float(on.loss_terms(module, None, None)["penalty"])
    assert value > 0
    assert off.loss_terms(module, None, None) == {}
    assert off.transform_gradients(module, ones) is ones
    numbers = on.metrics_to_log(module)
    assert numbers["state_megabytes"] == pytest.approx(on.state_bytes() / 1e6)
    assert numbers["distance"] > 0
    on.strength = 10.0
    assert float(on.loss_terms(module, None, None)["penalty"]) == pytest.approx(2 * value, rel=1e-5)
    save_tree(tmp_path / "state.safetensors", on.state_dict())
    back = KroneckerEWC(strength=10.0)
    back.load_state_dict(load_tree(tmp_path / "state.safetensors"))
    assert torch.equal(back.loss_terms(module, None, None)["penalty"], on.loss_terms(module, None, None)["penalty"])


def test_separate_keeps_every_domain_and_online_one(llama: Path) -> None:
    module = build(llama, online=KroneckerEWC(decay=0.5), separate=KroneckerEWC(mode="separate"), first=KroneckerEWC())
    finish(module)
    size = module.mitigations["online"].state_bytes()
    first = module.mitigations.pop("first")
    move(module, 2)
    alone = float(first.loss_terms(module, None, None)["penalty"])
    finish(module, 1)
    online, separate = (module.mitigations[name] for name in ("online", "separate"))
    assert float(online.loss_terms(module, None, None)["penalty"]) == 0, "one anchor, the latest"
    assert float(separate.loss_terms(module, None, None)["penalty"]) == pytest.approx(alone, rel=1e-5)
    assert abs(online.state_bytes() - size) < 100
    assert separate.state_bytes() > 1.9 * size
    facts = online.state["facts"]
    assert isinstance(facts, Tensor)
    assert unpack_facts(facts)["weights"] == [1.5]


def test_only_plain_lora_is_accepted(llama: Path) -> None:
    from support.peft_configs import CONFIGS

    def made(adapter: Any) -> ContinualModule:
        parts = {"backbone": CausalLM(path=str(llama)), "objective": SFT()}
        return ContinualModule(**parts, adapter=adapter, mitigations={"kfac": KroneckerEWC()})

    for name in ("lora", "lora_dropout", "rslora", "pissa", "olora", "orthogonal"):
        module = made(Peft(config=CONFIGS[name]()))
        module.build(seed=0)
        assert module.adapter.low_rank_layers(module.model)
    for adapter in (Full(), *(Peft(config=CONFIGS[name]()) for name in ("dora", "bdlora", "mica", "ia3", "vera"))):
        with pytest.raises(UserError, match="low_rank"):
            made(adapter)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapted_embedding_is_refused(llama: Path) -> None:
    """Its factors are no linear layer's; leaving them out would protect a part of the update in silence."""
    embedding = lora(target_modules=["q_proj", "embed_tokens"], r=2)
    module = ContinualModule(backbone=CausalLM(path=str(llama)), objective=SFT(), adapter=embedding)
    module.build(seed=0)
    with pytest.raises(UserError, match="low_rank"):
        embedding.low_rank_layers(module.model)


def test_a_strong_pull_keeps_the_update_where_it_was(llama: Path, tmp_path: Path) -> None:
    """What the second domain does to the outputs of the first shrinks as λ grows."""
    forgetting = []
    for strength in (0.0, 1e6):
        options = {"kinds": {"a": "label", "b": "label"}, "steps": 6}
        adapter = lora(target_modules="all-linear", r=2)
        record, _ = train(tmp_path / str(strength), llama, adapter, {"k": KroneckerEWC(strength=strength)}, **options)
        scores = record["scores"]["nll"]["R"]
        forgetting.append(abs(scores[2][0] - scores[1][0]))
    assert forgetting[1] < 0.5 * forgetting[0]


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"decay": 2.0}, {"fisher_samples": 0}], ids=str)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        KroneckerEWC(**options)
