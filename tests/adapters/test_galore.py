"""GaLore in a stream: what is projected, kill and resume around a refresh, the layer-wise variant and its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from residency.adapters import GaLore
from residency.adapters.galore import projected_names
from residency.adapters.optim import GaLoreOptimizer
from residency.backbones import CausalLM, Quantisation
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree
from residency.mitigations import Mitigation, Replay
from residency.testing.tiny_runs import make_module, train
from support.killed_runs import Kill, in_child

TWO = {"a": "generative", "b": "label"}


def test_matrices_of_the_blocks_are_projected(llama: Path, gpt2: Path) -> None:
    for folder, head in ((llama, "embed_tokens"), (gpt2, "wte")):
        model = CausalLM(path=str(folder)).load()
        names = projected_names(model, exclude=None)
        shapes = {name: p.ndim for name, p in model.named_parameters()}
        assert all(shapes[name] == 2 and head not in name for name in names)
        plain = {name for name in shapes if name not in names}
        assert all(shapes[name] == 1 or "embed" in name or "wte" in name or "wpe" in name for name in plain)
    left = projected_names(model, exclude=["attn", r"h\.1"])
    assert left
    assert all("h.0.mlp" in name for name in left)
    with pytest.raises(UserError, match=r"model\.adapter\.exclude: 'atn' matches none"):
        GaLore(exclude=["atn"]).attach(model)


def test_moments_have_the_rank(llama: Path) -> None:
    model = GaLore(rank=4).attach(CausalLM(path=str(llama)).load())
    optimizer = GaLore(rank=4).optimizer(model, torch.optim.AdamW)
    assert isinstance(optimizer, GaLoreOptimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    low = [entry for entry in state.values() if "projector" in entry]
    assert len(low) == len(projected_names(model, exclude=None))
    assert all(4 in entry["exp_avg"].shape and entry["exp_avg"].ndim == 2 for entry in low)
    assert {tuple(entry["exp_avg"].shape) for entry in low} == {(64, 4), (4, 64), (32, 4), (4, 32)}


@pytest.mark.parametrize("options", [{"rank": 0}, {"gap": 0}, {"scale": 0.0}])
def test_senseless_numbers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="a subspace has at least one dimension"):
        GaLore(**options)


def test_a_quantised_base_is_refused(llama: Path) -> None:
    with pytest.raises(UserError, match=r"full fine-tuning \(GaLore\) of a quantised backbone"):
        GaLore().attach(CausalLM(path=str(llama), quantisation=Quantisation()).load())


@pytest.fixture(scope="module")
def uninterrupted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The row of the table: a new subspace every 3 steps; 5 steps per stage."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert in_child(folder, llama, "galore", [], steps=5, every=1, kinds=TWO) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 4])
def test_kill_and_resume_is_bit_equal(step: int, llama: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Inside a subspace (2), just before its refresh (3) and just after it (4); the refresh is made by step 4."""
    options: dict[str, Any] = {"steps": 5, "every": 1, "kinds": TWO}
    assert in_child(tmp_path / "run", llama, "galore", [], Kill(stage=2, step=step), **options) == -9
    assert (tmp_path / "run" / "stages" / "2-b" / "checkpoint.safetensors").is_file()
    assert in_child(tmp_path / "run", llama, "galore", [], **options) == 0
    for stage in ("1-a", "2-b"):
        ours, theirs = (
            load_tree(run / "stages" / stage / "state.safetensors")["weights"]
            for run in (tmp_path / "run", uninterrupted)
        )
        assert {*ours} == {*theirs}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_layerwise_is_the_same_training(llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"kinds": TWO, "trainer": {"gradient_clip_val": None}}
    records, modules = zip(
        *(
            train(tmp_path / str(layerwise), llama, GaLore(rank=4, gap=3, layerwise=layerwise), **options)
            for layerwise in (False, True)
        ),
        strict=True,
    )
    assert records[0]["scores"] == records[1]["scores"]
    states = [module.adapter.state(module.model) for module in modules]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(p._post_accumulate_grad_hooks for p in modules[1].model.parameters()), "hooks end with their stage"


class _Gradients(Mitigation):
    def transform_gradients(self, module: Any, gradients: Any) -> Any:
        return gradients


class _Update(Mitigation):
    def transform_update(self, module: Any, before: Any, after: Any) -> Any:
        return after


def test_layerwise_refuses_what_comes_between_gradient_and_step(llama: Path, tmp_path: Path) -> None:
    adapter = GaLore(layerwise=True)
    for mitigation, hook in ((_Gradients(), "transform_gradients"), (_Update(), "transform_update")):
        with pytest.raises(UserError, match=f"{hook} comes after the backward pass"):
            make_module(llama, adapter, {"x": mitigation})
        make_module(llama, GaLore(), {"x": mitigation})
    make_module(llama, adapter, {"x": Replay(ratio=0.1)})
    with pytest.raises(UserError, match=r"gradient_clip_val=1\.0.*\n.*\n.*set trainer\.gradient_clip_val to null"):
        train(tmp_path / "clip", llama, adapter)
    with pytest.raises(UserError, match=r"2 micro-batches per step.*\n.*nothing is accumulated"):
        train(tmp_path / "acc", llama, adapter, trainer={"gradient_clip_val": None}, data={"micro_batch_size": 2})
    assert not (tmp_path / "clip" / "stages").exists(), "refused before anything was scored"
