"""Bottleneck adapters: identity at the start, count, checkpointing, detaching, files of our own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from residency.adapters import Bottleneck
from residency.adapters.export_format import attach_exported
from residency.backbones import CausalLM, Quantisation
from residency.core.errors import UserError

IDS = torch.arange(20, 44).view(2, 12)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def tree(model: nn.Module) -> list[tuple[str, str, int]]:
    return [(name, type(m).__name__, len(m._forward_hooks)) for name, m in model.named_modules()]


def disturb(model: nn.Module) -> nn.Module:
    """As if it had been trained."""
    draw = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=draw)
            assert "residency_bottleneck" in name
    return model


@pytest.fixture(params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Both architectures."""
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize(("placement", "each"), [("pfeiffer", 1), ("houlsby", 2)])
def test_identity_count_and_detaching(placement: Any, each: int, folder: Path) -> None:
    base = CausalLM(path=str(folder)).load()
    original, reference = tree(base), logits(base)
    adapter = Bottleneck(placement=placement, reduction=8)
    model = adapter.attach(base)
    assert torch.equal(logits(model), reference)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 2 * each * (2 * 32 * 32 // 8 + 32 // 8 + 32), "2 d d / rf and biases, per sublayer of two blocks"
    tuned = logits(disturb(model))
    assert not torch.equal(tuned, reference)
    with adapter.reference(model):
        assert torch.equal(logits(model), reference)
    assert torch.equal(logits(model), tuned)
    assert adapter.attach(model) is model
    assert tree(adapter.detach(model)) == original
    assert torch.equal(logits(model), reference)


def test_equation(llama: Path) -> None:
    """Behind the feed-forward part of block 1: h + s W_up relu(W_down h + b) + s b."""
    model = disturb(Bottleneck(activation="relu", scale=0.5).attach(CausalLM(path=str(llama)).load()))
    part: Any = model.get_submodule("model.layers.1.mlp")
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    h = part.forward(x)
    own = part.residency_bottleneck
    inner = torch.relu(h @ own.down.weight.T + own.down.bias)
    torch.testing.assert_close(part(x), h + 0.5 * (inner @ own.up.weight.T + own.up.bias))


def test_gradient_checkpointing_changes_nothing(folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = CausalLM(path=str(folder), gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        model = disturb(Bottleneck(placement="houlsby").attach(backbone.load())).train()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert all(float(gradient.abs().sum()) > 0 for gradient in plain.values())


def test_a_copy_has_bottlenecks_of_its_own(llama: Path) -> None:
    model = disturb(Bottleneck().attach(CausalLM(path=str(llama)).load()))
    twin = copy.deepcopy(model)
    before = logits(twin)
    disturb(model)
    assert torch.equal(logits(twin), before)


def test_on_a_quantised_base(llama: Path) -> None:
    backbone = CausalLM(path=str(llama), quantisation=Quantisation())
    reference = logits(backbone.load())
    adapter = Bottleneck(reduction=4)
    model = adapter.attach(backbone.load())
    assert torch.equal(logits(model), reference)
    assert not torch.equal(logits(disturb(model)), reference)


def test_files_of_our_own(folder: Path, tmp_path: Path) -> None:
    adapter = Bottleneck(placement="houlsby", reduction=4, activation="swish", scale=0.7)
    model = disturb(adapter.attach(CausalLM(path=str(folder)).load()))
    adapter.export(model, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again, loaded = attach_exported(base, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert isinstance(again, Bottleneck)
    assert again.options == adapter.options
    described = json.loads((tmp_path / "residency_adapter.json").read_text())
    for name in ("os.system", "Adapter", "attach_exported"):
        (tmp_path / "residency_adapter.json").write_text(json.dumps({**described, "class": name}))
        with pytest.raises(UserError, match="residency has no adapter of that name"):
            attach_exported(base, tmp_path)


def test_what_cannot_work_is_refused(llama: Path) -> None:
    base = CausalLM(path=str(llama)).load()
    with pytest.raises(UserError, match=r"model\.adapter\.attention = 'attn' matches nothing in .*: self_attn, mlp"):
        Bottleneck(placement="houlsby", attention="attn").attach(base)
    with pytest.raises(UserError, match="reduction = 0"):
        Bottleneck(reduction=0)
    assert "mergeable" not in Bottleneck().provides
    with pytest.raises(UserError, match="mergeable"):
        Bottleneck().merge(base)
