"""Where matrices stand, on both ways of storing them; and all constraints together over a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from residency.adapters.peft import lora
from residency.core.signals import Stopped
from residency.core.tensor_files import load_tree
from residency.mitigations import GEM, GPM, MIGU, Mitigation, SourceShielding, ZClip
from residency.mitigations.constraints.linear_maps import kept_share, layer_weight, linear_maps
from residency.testing.tiny_runs import make_module, train


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_axes_are_input_and_output_features(architecture: str, request: pytest.FixtureRequest) -> None:
    """The layer's own input and output say which is which."""
    from residency.adapters import Full

    module = make_module(request.getfixturevalue(architecture), Full(), {})
    module.build(seed=0)
    leaves = module.adapter.trainable(module.model)
    places = linear_maps(module.model, leaves)
    assert len(places) == (14 if architecture == "llama" else 8), "no norm, no embedding, no tied head"
    for name, place in places.items():
        assert place.kind == "weight"
        owner: Any = module.model.get_submodule(place.owner)
        weight = layer_weight(module.model, place.layer)
        x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))
        bias = 0 if owner.bias is None else owner.bias
        torch.testing.assert_close(owner(x), x @ weight.T + bias)
        stored = leaves[name].detach()
        assert place.transposed == (architecture == "gpt2")
        torch.testing.assert_close(x @ place.by_input(stored), x @ weight.T)
        inputs, outputs = torch.arange(weight.shape[1]), torch.arange(weight.shape[0])
        torch.testing.assert_close(place.by_input(stored * place.over_inputs(inputs)), (weight * inputs).T)
        torch.testing.assert_close(place.by_input(stored * place.over_outputs(outputs)), weight.T * outputs)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_factors_of_lora(architecture: str, request: pytest.FixtureRequest) -> None:
    targets = ["q_proj", "up_proj"] if architecture == "llama" else ["c_attn"]
    adapter = lora(target_modules=targets, r=2, fan_in_fan_out=architecture == "gpt2")
    module = make_module(request.getfixturevalue(architecture), adapter, {})
    module.build(seed=0)
    leaves = module.adapter.trainable(module.model)
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.add_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1)))
    places = linear_maps(module.model, leaves)
    assert {*places} == {*leaves}
    assert {p.kind for p in places.values()} == {"A", "B"}
    assert {p.layer.rpartition(".")[2] for p in places.values()} == {*targets}
    for layer in {p.layer for p in places.values()}:
        owner: Any = module.model.get_submodule(layer)
        weight = layer_weight(module.model, layer)
        x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))
        bias = 0 if owner.base_layer.bias is None else owner.base_layer.bias
        torch.testing.assert_close(owner(x), x @ weight.T + bias, rtol=1e-4, atol=1e-4)


def test_the_share_of_an_update_that_is_kept() -> None:
    before = {"a": torch.zeros(3), "b": torch.zeros(1)}
    after = {"a": torch.tensor([3.0, 0.0, 0.0]), "b": torch.tensor([4.0])}
    assert float(kept_share(before, after, after)) == 1
    assert float(kept_share(before, after, before)) == 0
    assert float(kept_share(before, after, {**after, "b": before["b"]})) == pytest.approx(0.6)
    assert float(kept_share(before, before, before)) == 1


def test_a_stopped_run_with_all_constraints_that_compose_goes_on_bit_for_bit(llama: Path, tmp_path: Path) -> None:
    """All of them that go together, stopped in the middle of the second domain."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
            if (module.stage.index, trainer.global_step) == (1, 3):
                raise Stopped("SIGKILL")

    def run(name: str, *callbacks: Callback) -> tuple[Any, dict[str, Mitigation]]:
        constraints: dict[str, Mitigation] = {
            "zclip": ZClip(threshold=0.5, warmup=2),
            "gem": GEM(capacity=4, samples=2),
            "migu": MIGU(threshold=0.3),
            "gpm": GPM(energy=0.8, samples=4),
            "ssu": SourceShielding(samples=2, tokens=6),
        }
        adapter = lora(target_modules="all-linear", r=4, lora_dropout=0.1)
        kinds = {"a": "generative", "b": "label"}
        record, _ = train(tmp_path / name, llama, adapter, constraints, kinds=kinds, callbacks=callbacks)
        return record, constraints

    with pytest.raises(Stopped):
        run("stopped", Stop())
    assert list((tmp_path / "stopped" / "stages").glob("2-*/checkpoint.safetensors")), "nothing to go on from"
    again, _ = run("stopped")
    whole, constraints = run("whole")
    assert again["scores"] == whole["scores"]
    states = [load_tree(tmp_path / name / "stages" / "2-b" / "state.safetensors") for name in ("stopped", "whole")]
    assert {*states[0]["mitigations"]} == {*constraints}
    assert _leaves(states[0]["weights"]) == _leaves(states[1]["weights"])
    for name in constraints:
        assert _leaves(states[0]["mitigations"][name]) == _leaves(states[1]["mitigations"][name]), name


def _leaves(tree: Any) -> Any:
    return {k: _leaves(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.tolist()
