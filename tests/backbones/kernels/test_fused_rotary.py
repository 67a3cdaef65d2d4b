"""Rotary positions as one node: only where the layer's own function is the same one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from residency.backbones.kernels.rotary import fuse_rotary, rotate

IDS = torch.arange(1, 13).view(2, 6)


def states(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, cosines, sines; the two halves of the latter differ, as no model has them."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 4, 6), (2, 5, 2, 6), (1, 5, 6), (1, 5, 6))
    query, key, cos, sin = (torch.randn(*shape, generator=draw, dtype=dtype) for shape in shapes)
    return [query.transpose(1, 2).requires_grad_(), key.transpose(1, 2).requires_grad_(), cos, sin]


def test_turned_and_turned_back_as_by_transformers() -> None:
    mine, theirs = rotate(*states()), apply_rotary_pos_emb(*states())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)
    inputs = states()
    assert torch.autograd.gradcheck(rotate, inputs)
    assert mine[0].stride() == inputs[0].stride(), "the memory order of the layer before is kept"


def load(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)


def gradients(model: Any) -> list[Tensor]:
    model(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    return [p.grad for p in model.parameters()]


def test_a_model_computes_the_same(llama: Path) -> None:
    plain, theirs = load(llama), modeling_llama.apply_rotary_pos_emb
    fused = copy.deepcopy(plain)
    assert fuse_rotary(fused) == 2
    assert modeling_llama.apply_rotary_pos_emb is theirs, "other models of the process are left alone"
    torch.testing.assert_close(fused(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients(fused), gradients(plain), rtol=1e-4, atol=1e-4)


def test_a_copy_turns_its_own_states(llama: Path) -> None:
    model = load(llama)
    fuse_rotary(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.zero_()
    assert not torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    torch.testing.assert_close(model(input_ids=IDS).logits, load(llama)(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_half_precision_keeps_its_own_rounding(llama: Path) -> None:
    plain, fused = load(llama).bfloat16(), load(llama).bfloat16()
    fuse_rotary(fused)
    assert torch.equal(fused(input_ids=IDS).logits, plain(input_ids=IDS).logits)


class Interleaved(nn.Module):
    """Pairs neighbours instead of halves, as GPT-J does, under the same name."""

    def forward(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return apply_rotary_pos_emb(query, key, cos, sin)


def test_another_function_of_the_same_name_stays(monkeypatch: Any) -> None:
    def pairs(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def turned(x: Tensor) -> Tensor:
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return query * cos + turned(query) * sin, key * cos + turned(key) * sin

    assert fuse_rotary(nn.ModuleList([Interleaved()])) == 1, "the function of Llama, found in this file"
    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", pairs)
    assert fuse_rotary(nn.ModuleList([Interleaved()])) == 0
    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", lambda query, key: (query, key))
    assert fuse_rotary(nn.ModuleList([Interleaved()])) == 0
