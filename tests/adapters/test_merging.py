"""LoRA folded in for scoring: the same function, and afterwards the very same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from residency.adapters.peft import lora
from residency.adapters.peft_tools.folding import merged_lora
from residency.backbones import CausalLM
from residency.core.batching import make_batch
from residency.core.types import Example

ROWS = [Example.of(domain="d", row=str(i), prompt=tuple(range(1, 5 + i)), completion=(3, 9, i)) for i in range(3)]


def attached(backbone: CausalLM, **options: Any) -> tuple[Any, nn.Module]:
    """A tiny model with a LoRA that changes it a lot."""
    torch.manual_seed(0)
    model = backbone.load()
    options["fan_in_fan_out"] = model.config.model_type == "gpt2"
    adapter = lora(r=3, target_modules="all-linear", **options)
    model = adapter.attach(model).eval()
    for parameter in adapter.trainable(model).values():
        parameter.data.normal_(std=0.3)
    return adapter, model


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True}),
        ("llama", {"use_dora": True}),
        ("gpt2", {}),
        ("gpt2", {"lora_bias": True}),
    ],
)
def test_the_same_logits_and_the_same_bits_afterwards(
    architecture: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Also where nothing can be folded: DoRA and a trained bias stay as they are."""
    backbone = CausalLM(path=str(request.getfixturevalue(architecture)))
    adapter, model = attached(backbone, **dict(options))
    batch = make_batch(ROWS, layout="packed")
    wanted, before, names = backbone.logits(model, batch), bits(model), [*dict(model.named_parameters())]
    parameters = [id(p) for p in model.parameters()]
    with adapter.folded_for_scoring(model):
        merged = backbone.logits(model, batch)
        changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    torch.testing.assert_close(merged, wanted, atol=1e-5, rtol=1e-5)
    assert bool(changed) == (not {*options} & {"use_dora", "lora_bias"})
    assert [*dict(model.named_parameters())] == names
    assert [id(p) for p in model.parameters()] == parameters
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(backbone.logits(model, batch), wanted)


@torch.no_grad()
def test_several_active_adapters_are_summed(llama: Path) -> None:
    backbone = CausalLM(path=str(llama))
    adapter, model = attached(backbone)
    model.add_adapter("second", adapter.config)  # type: ignore[operator]
    model.base_model.set_adapter(["default", "second"])  # type: ignore[operator, union-attr]
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.data.normal_(std=0.3)
    batch = make_batch(ROWS, layout="packed")
    wanted = backbone.logits(model, batch)
    with merged_lora(model):
        torch.testing.assert_close(backbone.logits(model, batch), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(backbone.logits(model, batch), wanted)


@torch.no_grad()
def test_a_layer_that_is_watched_stays_open(llama: Path) -> None:
    """A hook inside a LoRA layer sees what it would have seen."""
    backbone = CausalLM(path=str(llama))
    _, model = attached(backbone)
    seen: list[str] = []
    watched = [name for name, _ in model.named_modules() if name.endswith("0.self_attn.q_proj.lora_A.default")]
    handle = model.get_submodule(watched[0]).register_forward_hook(lambda *_: seen.append("A"))
    with merged_lora(model):
        backbone.logits(model, make_batch(ROWS, layout="packed"))
    handle.remove()
    assert seen == ["A"]


@torch.no_grad()
def test_what_must_not_be_folded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision (a rounded sum is another function), adapters that are off, and weights above the limit."""
    backbone = CausalLM(path=str(llama), dtype="bfloat16")
    adapter, model = attached(backbone)
    before = bits(model)

    def untouched(adapter: Any, model: nn.Module) -> bool:
        with adapter.folded_for_scoring(model):
            return all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    assert untouched(adapter, model)
    adapter, model = attached(CausalLM(path=str(llama)))
    before = bits(model)
    assert not untouched(adapter, model)
    with adapter.reference(model):
        assert untouched(adapter, model)
    monkeypatch.setattr("residency.adapters.peft_tools.folding.MERGE_BYTES", 1000)
    assert untouched(adapter, model)


def test_an_error_inside_restores_too(llama: Path) -> None:
    adapter, model = attached(CausalLM(path=str(llama)))
    before = bits(model)
    with pytest.raises(RuntimeError, match="out of memory"), torch.inference_mode(), adapter.folded_for_scoring(model):
        raise RuntimeError("out of memory")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    layer = next(m for m in model.modules() if hasattr(m, "merged_adapters"))
    assert layer.merged_adapters == []
