"""OSF: what is kept stays, the update is projected, every domain is split anew, and its state rebuilds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OSFConfig
from peft.tuners.osf import OSFLayer
from torch import Tensor, nn

from residency.adapters import OSF
from residency.adapters.osf import project
from residency.core.errors import UserError
from residency.core.tensors import snapshot
from residency.core.types import Stage
from residency.testing.tiny_runs import make_module, train
from support.tuned_models import attach, backbone, learn, logits

SGD, ADAM = torch.optim.SGD, torch.optim.AdamW


def osf(**options: Any) -> OSF:
    return OSF(config=OSFConfig(target_modules=["q_proj", "v_proj", "down_proj"], effective_rank=6), **options)


def stage(index: int, stages: int = 3) -> Stage:
    return Stage(index=index, domain="x", stages=stages, seed=0, steps=4, batch_size=4)


def layers(model: nn.Module) -> dict[str, OSFLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, OSFLayer)}


def leaks(model: nn.Module, start: dict[str, Tensor], factor: str) -> list[float]:
    """Share of each factor's movement that lies in the directions that are to be kept."""
    found = []
    for path, layer in layers(model).items():
        weight = layer.get_base_layer().weight.detach()
        u, _, vh = torch.linalg.svd(weight, full_matrices=False)
        rank = layer.effective_rank["default"]
        name = f"{path}.osf_svd_params.default.{factor}_low"
        moved = dict(model.named_parameters())[name].detach() - start[name]
        kept = u[:, :rank].T @ moved if factor == "U" else moved @ vh[:rank].T
        assert float(moved.norm()) > 0
        found.append(float(kept.norm() / moved.norm()))
    return found


def trained(folder: Path, adapter: OSF, optimizer: type, steps: int = 4) -> tuple[Any, dict[str, Tensor]]:
    """A model after some steps with the adapter's own transformation of each update, and its start."""
    model = attach(folder, adapter)
    start = snapshot(adapter.trainable(model))
    for _ in range(steps):
        before = snapshot(adapter.trainable(model))
        learn(model, steps=1, lr=2e-2 if optimizer is ADAM else 20.0, optimizer=optimizer)
        live = adapter.trainable(model)
        after = adapter.transform_update(model, before, {name: p.detach() for name, p in live.items()})
        with torch.no_grad():
            for name, tensor in after.items():
                live[name].copy_(tensor)
    return model, start


@pytest.mark.parametrize("factor", ["U", "V"])
@pytest.mark.parametrize(("optimizer", "own", "tight"), [(SGD, False, True), (ADAM, False, False), (ADAM, True, True)])
def test_what_is_kept_stays_with_sgd_leaks_with_adam_and_stays_projected(
    optimizer: type, own: bool, tight: bool, factor: str, llama: Path
) -> None:
    """PEFT projects gradients, which is enough for SGD; under Adam only a projected update stays in its subspace."""
    model, start = trained(llama, osf(project_update=own), optimizer)
    found = leaks(model, start, factor)
    assert len(found) == 6
    # Square factors have no room to leak into; where there is room, Adam uses it.
    assert max(found) < 1e-5 if tight else max(found) > 1e-2


def test_the_module_projects_every_update(llama: Path, tmp_path: Path) -> None:
    worst = []
    for own in (True, False):
        start = snapshot(dict(attach(llama, osf()).named_parameters()))
        _, module = train(tmp_path / str(own), llama, osf(project_update=own), kinds={"a": "label"})
        worst.append(max(leaks(module.model, start, "U")))
    assert worst[0] < 1e-5 < 1e-2 < worst[1]


def test_projection_is_a_projection() -> None:
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(8, 8))
    kept, free, step = basis[:, :3], basis[:, 3:], torch.randn(8, 5)
    once = project(step, kept=kept, free=free, rows=False)
    torch.testing.assert_close(kept.T @ once, torch.zeros(3, 5), rtol=0, atol=1e-6)
    torch.testing.assert_close(project(once, kept=kept, free=free, rows=False), once)
    torch.testing.assert_close(project(step, kept=None, free=free, rows=False), once)
    torch.testing.assert_close(project(step.T, kept=kept.T, free=free.T, rows=True), once.T)


def test_a_new_split_keeps_the_function_and_takes_the_update_in(llama: Path) -> None:
    adapter = osf()
    model, _ = trained(llama, adapter, ADAM)
    before = logits(model)
    adapter.begin_stage(model, stage(1), iter)  # type: ignore[arg-type]
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    for layer in layers(model).values():
        assert not layer.get_delta_weight("default").any(), "the update is part of the weight now"
        assert not layer.merged
        assert len(layer.hook_handles) == 2, "hooks of the former split are gone"
    assert {*adapter.trainable(model)} == {*adapter.trainable(attach(llama, adapter))}
    learn(model)
    assert not torch.equal(logits(model), before)


def test_the_first_domain_starts_where_attaching_left_it(llama: Path) -> None:
    adapter = osf()
    model = attach(llama, adapter)
    before = snapshot(adapter.state(model))
    adapter.begin_stage(model, stage(0), iter)  # type: ignore[arg-type]
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter.state(model).items())


def test_a_growing_schedule_preserves_a_growing_share(llama: Path) -> None:
    adapter = osf(schedule="growing")
    model = attach(llama, adapter)
    ranks = []
    for index in range(4):
        adapter.begin_stage(model, stage(index, 4), iter)  # type: ignore[arg-type]
        ranks.append([layer.effective_rank["default"] for layer in layers(model).values()][:2])
    assert ranks == [[1, 1], [8, 4], [16, 8], [24, 12]]  # q_proj 32 x 32, v_proj 16 x 32
    state = snapshot(adapter.state(model))
    fresh = attach(llama, adapter)
    adapter.load_state(fresh, state)
    assert torch.equal(logits(fresh), logits(model)), "a state of another rank rebuilds the split"
    assert {*adapter.state(fresh)} == {*state}


def test_a_state_brings_its_weights_along(llama: Path) -> None:
    adapter = osf()
    model, _ = trained(llama, adapter, ADAM)
    adapter.begin_stage(model, stage(1), iter)  # type: ignore[arg-type]
    learn(model)
    fresh = attach(llama, adapter, seed=3)
    adapter.load_state(fresh, adapter.state(model))
    assert torch.equal(logits(fresh), logits(model))
    for one, other in zip(layers(fresh).values(), layers(model).values(), strict=True):
        assert torch.equal(one.get_base_layer().weight, other.get_base_layer().weight)


def test_weights_are_the_whole_matrices(llama: Path) -> None:
    adapter = osf()
    model, _ = trained(llama, adapter, ADAM)
    state = snapshot(adapter.state(model))
    whole = adapter.weights(model, state)
    path, layer = next(iter(layers(model).items()))
    expected = layer.get_base_layer().weight.detach() + layer.get_delta_weight("default").detach()
    torch.testing.assert_close(whole[f"{path}.base_layer.weight"], expected)
    base = dict(backbone(llama).load().named_parameters())
    half = {name: (whole[name] + base[_plain(name)]) / 2 for name in whole}
    adapter.load_weights(model, half)
    again = adapter.weights(model, adapter.state(model))
    assert all(torch.allclose(again[name], half[name], atol=1e-6) for name in half)


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.weight", ".weight")


def test_a_quantised_base_is_refused(llama: Path) -> None:
    with pytest.raises(UserError, match=r"OSFConfig on a quantised backbone(.|\n)*lora\.yaml"):
        attach(llama, osf(), quantised=True)


def test_a_mitigation_that_compares_coordinates_is_refused(llama: Path) -> None:
    from residency.mitigations import EWC

    with pytest.raises(UserError, match="needs fixed_coordinates"):
        make_module(llama, osf(), {"ewc": EWC()})
