"""The fused LoRA node: the function and the gradients of PEFT's own forward, and stepping aside where it must."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from residency.backbones.kernels.lora import fuse_lora, lora_linear
from residency.backbones.kernels.norm import fuse_norms
from support.autograd_graphs import count_nodes
from support.small_llamas import small


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)])
def test_value_and_gradients(bias: bool, shape: tuple[int, ...]) -> None:
    x, weight, a, b = (
        draw(*shape).requires_grad_(),
        draw(4, 7),
        draw(3, 7).requires_grad_(),
        draw(4, 3).requires_grad_(),
    )
    offset = draw(4) if bias else None
    fused = lora_linear(x, weight, offset, a, b, 1.7)
    plain = nn.functional.linear(x, weight, offset) + 1.7 * (x @ a.T @ b.T)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(
        torch.autograd.grad(fused.sin().sum(), (x, a, b)), torch.autograd.grad(plain.sin().sum(), (x, a, b))
    )
    assert torch.autograd.gradcheck(lambda *t: lora_linear(t[0], weight, offset, t[1], t[2], 0.3), (x, a, b))


def test_an_input_without_gradient_costs_none() -> None:
    x, weight, a, b = draw(5, 7), draw(4, 7), draw(3, 7).requires_grad_(), draw(4, 3)
    out = lora_linear(x, weight, None, a, b, 1.0)
    out.sum().backward()
    assert a.grad is not None
    assert x.grad is None
    assert not lora_linear(x, weight, None, a.detach(), b, 1.0).requires_grad


def peft_model(backbone: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


IDS = torch.arange(1, 13).view(2, 6)


def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=IDS).logits
    return out


def nodes(model: Any) -> int:
    """Fused nodes in the graph of one forward pass."""
    return count_nodes(logits(model), "_LoraLinearBackward")


def test_a_model_computes_the_same(llama: Path) -> None:
    plain = peft_model(llama)
    fused = copy.deepcopy(plain)
    assert nodes(plain) == 0
    assert fuse_lora(fused) == 14
    fuse_norms(fused)
    assert nodes(fused) == 14, "seven layers of each of the two blocks"
    torch.testing.assert_close(logits(fused), logits(plain), rtol=0, atol=1e-5)
    for model in (plain, fused):
        logits(model).logsumexp(-1).sum().backward()
    for (name, p), (_, q) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_copy_runs_on_its_own_weights(llama: Path) -> None:
    model = peft_model(llama)
    fuse_lora(model)
    before = logits(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), before)
    assert not logits(other).any()


def test_steps_aside(llama: Path) -> None:
    """Adapters off, merged, dropout in training, DoRA, hooks on a part: PEFT's own forward, with its result."""
    model = peft_model(llama)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    fuse_lora(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    tuned = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), tuned, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    seen: list[tuple[int, ...]] = []
    part = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default
    handle = part.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    assert nodes(model) == 13
    assert seen == [(2, 6, 3)]
    handle.remove()
    assert nodes(model) == 14
    other = peft_model(llama, use_dora=True)
    fuse_lora(other)
    assert nodes(other) == 0


def test_dropout_only_matters_in_training(llama: Path) -> None:
    model = peft_model(llama, lora_dropout=0.5)
    fuse_lora(model)
    assert nodes(model.train()) == 0
    assert nodes(model.eval()) == 14


def test_autocast_and_other_dtypes_step_aside(llama: Path) -> None:
    model = peft_model(llama)
    fuse_lora(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nodes(model) == 0
    assert nodes(model.bfloat16()) == 14


def test_biases_that_are_trained_get_their_gradients(tmp_path: Path) -> None:
    small(attention_bias=True, num_hidden_layers=1).save_pretrained(tmp_path)
    model = peft_model(tmp_path, bias="lora_only")
    fuse_lora(model)
    logits(model).sin().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if name.endswith("bias")}
    assert len(trained) == 4
    assert all(gradient is not None for gradient in trained.values())
