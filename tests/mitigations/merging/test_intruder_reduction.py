"""Intruder dimensions: found where they were put, scaled down, and as PEFT does it where PEFT does it right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.intruders import reduce_intruder_dimension

from residency.adapters import Full, Peft
from residency.adapters.peft import lora
from residency.core.errors import UserError
from residency.core.types import Stage
from residency.mitigations import IntruderReduction
from residency.mitigations.merging.intruder_reduction import intruders, reduce_intruders
from residency.testing.tiny_runs import make_module
from support.two_stages import randn

STAGE = Stage(index=0, domain="a", stages=1, seed=0, steps=1, batch_size=1)


def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """W (12, 8) of full rank, and a direction outside of its columns along its weakest input direction."""
    u = torch.linalg.qr(randn(12, 12)).Q
    v = torch.linalg.qr(randn(8, 8, seed=1)).Q
    base = u[:, :8] @ torch.diag(torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 1e-4])) @ v.T
    return base, 10 * torch.outer(u[:, 9], v[:, 7]), u[:, 9], v[:, 7]


def test_a_planted_intruder_is_found() -> None:
    base, update, u, v = planted()
    left, right = intruders(base, update, top_k=3, threshold=0.5)
    assert (left.shape, right.shape) == ((12, 1), (1, 8))
    torch.testing.assert_close(left @ right, 10 * torch.outer(u, v), rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 0.25, 0.75, 1.0])
def test_it_is_scaled(scale: float) -> None:
    base, update, u, v = planted()
    found = reduce_intruders(base, update, top_k=3, threshold=0.5, scale=scale)
    torch.testing.assert_close(found, scale * 10 * torch.outer(u, v), rtol=0, atol=1e-3)
    assert scale != 1.0 or torch.equal(found, update)


def test_known_directions_are_left_alone() -> None:
    base, _, _, _ = planted()
    for update in (torch.zeros_like(base), 0.5 * base):
        assert intruders(base, update, top_k=8, threshold=0.5)[0].shape[1] == 0
        assert torch.equal(reduce_intruders(base, update, top_k=8, threshold=0.5, scale=0.0), update)
    _, planted_update, _, _ = planted()
    assert intruders(base, 0.1 * planted_update, top_k=3, threshold=0.5)[0].shape[1] == 0, "below the largest three"


def tuned(llama: Path, adapter: Peft, mitigation: IntruderReduction) -> Any:
    """A module whose LoRA is large enough to bring in new directions."""
    module = make_module(llama, adapter, {"x": mitigation})
    module.build(seed=0)
    module.begin_stage(STAGE, ())
    state = {
        name: 0.4 * randn(*leaf.shape, seed=i)
        for i, (name, leaf) in enumerate(module.adapter.state(module.model).items())
    }
    module.adapter.load_state(module.model, state)
    return module


def deltas(model: Any, name: str) -> dict[str, torch.Tensor]:
    from peft.tuners.lora import LoraLayer

    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {path: layer.get_delta_weight(name).detach() for path, layer in layers.items()}


@pytest.mark.parametrize("scale", [0.75, 0.0])
def test_against_peft(scale: float, llama: Path) -> None:
    adapter = lora(target_modules="all-linear", r=3, lora_alpha=6)
    module = tuned(llama, adapter, IntruderReduction(scale=scale, top_k=6, threshold=0.6))
    before = deltas(module.model, "default")
    told: list[str] = []
    reduce_intruder_dimension(
        module.model, top_k=6, threshold_epsilon=0.6, mitigation_lambda=scale, logging_sink=told.append
    )
    wanted = deltas(module.model, "intruder_reduced")
    module.model.set_adapter("default")
    module.model.delete_adapter("intruder_reduced")
    assert sum("Intruders:" in line for line in told) > 3
    module.finish_stage()
    found = deltas(module.model, "default")
    assert {*found} == {*wanted}
    for path in wanted:
        torch.testing.assert_close(found[path], wanted[path], rtol=0, atol=1e-4)
    assert any(not torch.allclose(found[path], before[path], atol=1e-2) for path in found)
    assert 0 < module.weights_log["truncation"] < 1


def test_a_transposed_layer_is_reduced_in_its_own_orientation(gpt2: Path) -> None:
    """GPT-2 stores (in, out); PEFT's function assigns the factors the other way round there."""
    adapter = Peft(config=LoraConfig(target_modules=["c_attn", "c_fc"], r=3, lora_alpha=6, fan_in_fan_out=True))
    mitigation = IntruderReduction(scale=0.0, top_k=5, threshold=0.6)
    module = tuned(gpt2, adapter, mitigation)
    before = deltas(module.model, "default")
    module.finish_stage()
    after = deltas(module.model, "default")
    base = dict(module.backbone.load().named_parameters())
    changed = 0
    for path, old in before.items():
        weight = base[path.removeprefix("base_model.model.") + ".weight"].detach().T
        wanted = reduce_intruders(weight, old.T, top_k=5, threshold=0.6, scale=0.0)
        u, s, vh = torch.linalg.svd(wanted, full_matrices=False)
        torch.testing.assert_close(after[path].T, u[:, :3] * s[:3] @ vh[:3], rtol=0, atol=1e-4)
        changed += not torch.allclose(after[path], old, atol=1e-2)
    assert changed


@pytest.mark.parametrize("adapter", [Full(), lora(r=2, use_dora=True)])
def test_an_adapter_whose_update_is_no_product_is_refused(adapter: Any, llama: Path) -> None:
    with pytest.raises(UserError, match="low_rank"):
        make_module(llama, adapter, {"x": IntruderReduction()})


@pytest.mark.parametrize("options", [{"scale": -0.1}, {"scale": 1.1}, {"top_k": 0}, {"threshold": 2.0}])
def test_bad_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        IntruderReduction(**options)
