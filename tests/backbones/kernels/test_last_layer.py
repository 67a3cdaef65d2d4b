"""The last feed-forward part where it is read: the same logits and gradients, all positions for whoever watches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from residency.backbones import CausalLM
from residency.backbones.kernels.last_layer import only_at, trim_last_layer
from residency.core.batching import make_batch
from residency.core.types import Batch, Example


def batch() -> Batch:
    """Long prompts, short completions; two completions of one prompt begin at the same position."""
    examples = [
        Example.of(domain="a", row="1", prompt=tuple(range(1, 12)), completion=(4, 5)),
        Example.of(domain="a", row="2", prompt=tuple(range(3, 12)), completion=(7,), alternatives=((8, 9),)),
    ]
    return make_batch(examples, layout="packed")


def gradients(backbone: CausalLM, model: Any) -> list[Tensor]:
    backbone.logits(model, batch()).logsumexp(-1).sum().backward()
    return [p.grad for p in model.parameters()]


def widths(model: Any) -> tuple[list[int], Any]:
    """Positions that each activation function sees, and how to stop looking."""
    seen: list[int] = []
    original = type(model.model.layers[0].mlp.act_fn).forward

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        seen.append(x.shape[1])
        out: Tensor = original(module, x)
        return out

    return seen, forward


def test_logits_and_gradients_are_the_same(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = CausalLM(path=str(llama))
    trimmed = backbone.load()
    plain = copy.deepcopy(trimmed)
    del plain.model.layers[-1].mlp.forward
    seen, forward = widths(trimmed)
    monkeypatch.setattr(type(trimmed.model.layers[0].mlp.act_fn), "forward", forward)
    torch.testing.assert_close(backbone.logits(trimmed, batch()), backbone.logits(plain, batch()), rtol=0, atol=1e-5)
    n = batch().input_ids.shape[1]
    assert seen == [n, 4, n, n], "two positions of each example are read; the model without the part reads all"
    torch.testing.assert_close(gradients(backbone, trimmed), gradients(backbone, plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["model.layers.1", "model.layers.1.mlp.up_proj", "model.norm", "model"])
def test_who_watches_sees_all_positions(place: str, llama: Path) -> None:
    backbone = CausalLM(path=str(llama))
    model = backbone.load()
    reference = copy.deepcopy(model)
    del reference.model.layers[-1].mlp.forward
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(getattr(output, "last_hidden_state", output))

    for one in (model, reference):
        one.get_submodule(place).register_forward_hook(keep)
        backbone.logits(one, batch())
    found, wanted = (out[0] if isinstance(out, tuple) else out for out in outputs)
    assert torch.equal(found, wanted)


def test_what_is_outside_of_a_packed_row_is_whole(llama: Path) -> None:
    backbone = CausalLM(path=str(llama))
    model = backbone.load()
    x = torch.randn(1, 9, model.config.hidden_size)
    part = model.model.layers[-1].mlp
    whole = part(x)
    with only_at(torch.tensor([2, 7, 2])):
        found = part(x)
    assert not found[0, [0, 1, 3, 4, 5, 6, 8]].any()
    torch.testing.assert_close(found[0, [2, 7]], whole[0, [2, 7]], rtol=0, atol=1e-6)
    assert torch.equal(part(x), whole), "and all is read again afterwards"
    with only_at(torch.arange(8)):
        assert torch.equal(part(x), whole), "too many to be worth it"


class Mixing(nn.Module):
    """A feed-forward part in which positions meet."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up_proj(x - x.mean(1, keepdim=True))
        return out


def test_only_parts_that_go_token_by_token(llama: Path) -> None:
    model: Any = CausalLM(path=str(llama)).load()
    model.model.layers[-1].mlp = Mixing()
    assert not trim_last_layer(model)
    assert not trim_last_layer(nn.Linear(2, 2))
    checkpointing = CausalLM(path=str(llama), gradient_checkpointing=True).load()
    assert "forward" not in vars(checkpointing.model.layers[-1].mlp)
