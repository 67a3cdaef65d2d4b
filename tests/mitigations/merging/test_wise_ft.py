"""WiSE-FT: exact at both ends, and for LoRA the adapter's scale times alpha."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from residency.adapters.peft import lora
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Example
from residency.mitigations import Mitigation, WiseFT
from residency.mitigations.merging.weight_mixing import mix
from residency.testing.tiny_runs import make_module
from support.two_stages import ADAPTERS, equal, randn, two_stages

EXAMPLES = [Example.of(domain="x", row="0", prompt=(5, 6, 7), completion=(40, 50, 0))]

MAKE: dict[float, Callable[[], Mitigation]] = {
    0.0: lambda: WiseFT(alpha=0.0, into="train"),
    0.5: lambda: WiseFT(alpha=0.5, into="train"),
    1.0: lambda: WiseFT(alpha=1.0, into="train"),
}


def later() -> Mitigation:
    return WiseFT(alpha=0.5, first=False, into="train")


def logits(module: Any) -> torch.Tensor:
    module.model.eval()
    with torch.inference_mode():
        return module.forward(make_batch(EXAMPLES, layout="padded")).clone()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_alpha_zero_is_the_pretrained_model(adapter: str, llama: Path) -> None:
    base = make_module(llama, ADAPTERS["full"](), {})
    base.model, base.layout = base.backbone.load(), "padded"
    run = two_stages(llama, adapter, MAKE[0.0])
    assert torch.equal(logits(run.module), logits(base))
    rows = run.record["scores"]["nll"]["R"]
    assert rows[0] == rows[1] == rows[2]
    assert not torch.equal(logits(two_stages(llama, adapter).module), logits(base))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_alpha_one_is_the_tuned_model(adapter: str, llama: Path) -> None:
    plain, run = two_stages(llama, adapter), two_stages(llama, adapter, MAKE[1.0])
    assert torch.equal(logits(run.module), logits(plain.module))
    assert all(equal(one, other) for one, other in zip(plain.weights, run.weights, strict=True))


def test_full_weights_are_the_mean_with_the_base(llama: Path) -> None:
    base = dict(make_module(llama, ADAPTERS["full"](), {}).backbone.load().named_parameters())
    plain, run = two_stages(llama, "full"), two_stages(llama, "full", MAKE[0.5])
    tuned = plain.weights[0]
    assert equal(run.weights[0], {name: torch.lerp(base[name].detach(), tuned[name], 0.5) for name in tuned})


def test_of_lora_the_factor_b_is_scaled(llama: Path) -> None:
    """Nothing is decomposed: A is A, B is α B."""
    tuned, run = two_stages(llama, "lora").weights[0], two_stages(llama, "lora", MAKE[0.5]).weights[0]
    assert equal(run, {name: 0.5 * t if "lora_B" in name else t for name, t in tuned.items()})
    facts = two_stages(llama, "lora", MAKE[0.5]).tree(1)["facts"]
    assert facts["weights"] == {"truncation": 0.0}


@pytest.mark.parametrize(("alpha", "exact"), [(0.5, True), (0.25, True), (0.3, False), (0.9, False)])
@pytest.mark.parametrize("options", [{"r": 4, "lora_alpha": 12}, {"r": 40, "lora_alpha": 3, "use_rslora": True}])
def test_mixing_is_scaling_the_adapter(options: dict[str, Any], alpha: float, exact: bool, llama: Path) -> None:
    """Against PEFT's own scale; bit for bit where multiplying by α rounds nothing, at any rank."""
    modules = [make_module(llama, lora(target_modules="all-linear", **options), {}) for _ in range(2)]
    for module in modules:
        module.build(seed=0)
        module.layout = "padded"
    start = {name: leaf.clone() for name, leaf in modules[0].adapter.state(modules[0].model).items()}
    tuned = {name: 0.05 * randn(*leaf.shape, seed=i) for i, (name, leaf) in enumerate(start.items())}
    for module in modules:
        module.adapter.load_state(module.model, tuned)
    adapter, model = modules[0].adapter, modules[0].model
    adapter.load_weights(model, mix(adapter.weights(model, start), adapter.weights(model, tuned), alpha=alpha))
    for layer in modules[1].model.modules():
        if hasattr(layer, "scaling") and isinstance(layer.scaling, dict):
            layer.scaling["default"] *= alpha
    if exact:
        assert torch.equal(logits(modules[0]), logits(modules[1]))
    torch.testing.assert_close(logits(modules[0]), logits(modules[1]), rtol=1e-5, atol=1e-6)
    untouched = make_module(llama, lora(target_modules="all-linear", **options), {})
    untouched.build(seed=0)
    untouched.layout = "padded"
    assert not torch.allclose(logits(modules[0]), logits(untouched), atol=1e-4)


def test_the_first_stage_may_be_left_out(llama: Path) -> None:
    plain, run = two_stages(llama, "lora"), two_stages(llama, "lora", later)
    assert equal(run.weights[0], plain.weights[0])
    assert not equal(run.weights[1], plain.weights[1])


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_a_weight_outside_of_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(UserError, match="alpha="):
        WiseFT(alpha=alpha)
