"""Parts of a packed row side by side: the same values and gradients, and aside where it would not be the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from residency.backbones import CausalLM, Quantisation
from residency.backbones.kernels.lane_choice import lanes_for
from residency.backbones.kernels.lanes import run_in_lanes, split
from residency.backbones.kernels.lora import fuse_lora
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Batch, Example


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def batch(count: int = 5) -> Batch:
    """Rows of 5, 8, 11, ... tokens; the second has labels that share a beginning."""
    rows = [tuple((5 * i + 3 * j) % 250 + 1 for i in range(6 + 3 * j)) for j in range(count)]
    return make_batch(
        [
            Example.of(domain="a", row=str(j), prompt=x[:3], completion=x[3:], alternatives=((9, 8), (9, 7)) * (j == 1))
            for j, x in enumerate(rows)
        ],
        layout="packed",
    )


def peft_model(folder: Path, *, backbone: CausalLM | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    base: Any = (backbone or CausalLM(path=str(folder))).load()
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"} | options)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    fuse_lora(model)
    return model.eval()


def test_a_part_is_the_batch_of_its_examples() -> None:
    whole = batch()
    parts = split(whole, 2)
    assert sorted(torch.cat([places for _, places in parts]).tolist()) == list(range(len(whole.targets)))
    assert sum(part.tokens for part, _ in parts) == whole.tokens
    assert abs(parts[0][0].tokens - parts[1][0].tokens) <= 5, "no further apart than the shortest example is long"
    for part, places in parts:
        expected = make_batch(part.examples, layout="packed")
        for field in fields(Batch):
            found, wanted = getattr(part, field.name), getattr(expected, field.name)
            assert torch.equal(found, wanted) if isinstance(wanted, Tensor) else found == wanted, field.name
        assert torch.equal(whole.targets[places], part.targets)


@pytest.mark.parametrize("lanes", [2, 3, 9])
def test_values_and_gradients_are_the_same(lanes: int, llama: Path) -> None:
    apart, together = CausalLM(path=str(llama), lanes=lanes), CausalLM(path=str(llama), lanes=1)
    model = peft_model(llama)
    wanted, found = together.logits(model, batch()), apart.logits(model, batch())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(logits.logsumexp(-1).sum(), trained) for logits in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    again = torch.autograd.grad(apart.logits(model, batch()).logsumexp(-1).sum(), trained)
    assert all(map(torch.equal, gradients[0], again)), "two runs must not differ in a bit"
    nll = apart.target_nll(model, batch())
    torch.testing.assert_close(nll, together.target_nll(model, batch()), rtol=0, atol=1e-5)
    assert nll.is_inference()


def test_a_leaf_that_took_no_part_has_no_gradient(llama: Path) -> None:
    model = peft_model(llama)
    model.unused = nn.Parameter(torch.ones(1))
    CausalLM(path=str(llama), lanes=2).logits(model, batch()).sum().backward()
    assert model.unused.grad is None
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


def test_the_graph_is_there_once(llama: Path) -> None:
    out = CausalLM(path=str(llama), lanes=2).logits(peft_model(llama), batch()).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"model\.backbone\.lanes"):
        out.backward()


@pytest.mark.parametrize("lanes", [0, -1])
def test_no_lane_at_all_is_refused(lanes: int, llama: Path) -> None:
    with pytest.raises(UserError, match=rf"lanes is {lanes}(.|\n)*auto"):
        CausalLM(path=str(llama), lanes=lanes)


def test_threads_are_shared_out(threads: None) -> None:
    def run(part: Batch) -> Tensor:
        torch.ones(100, 100).mm(torch.ones(100, 100))
        return torch.full((len(part.targets),), torch.get_num_threads())

    for lanes, share in ((2, 2), (3, 1), (4, 1), (2, 2)):
        found = run_in_lanes(run, batch(), lanes=lanes, leaves=[])
        assert set(found.tolist()) == {share}
        assert torch.get_num_threads() == 4


def test_what_goes_wrong_in_a_lane_reaches_the_caller() -> None:
    def run(part: Batch) -> Tensor:
        raise ValueError("in a lane")

    for _ in range(2):
        with pytest.raises(ValueError, match="in a lane"):
            run_in_lanes(run, batch(), lanes=2, leaves=[])


def count(model: Any, *, asked: Any = 2, of: Batch | None = None) -> int:
    return lanes_for(model, of or batch(), asked)[0]


def test_the_choice(llama: Path, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model(llama)
    assert count(model) == 2
    assert count(model, asked=1) == 1
    assert count(model, asked=9) == 5, "no more than there are examples"
    assert count(model, of=batch(1)) == 1
    assert count(model, of=make_batch(batch().examples, layout="padded")) == 1
    assert count(model, asked="auto", of=batch(9)) == 1, "too small a model to pay"
    monkeypatch.setattr("residency.backbones.kernels.lane_choice._MIN_PARAMETERS", 1)
    assert count(model, asked="auto", of=batch(9)) == 2
    assert count(model, asked="auto", of=batch(2)) == 1, "too few tokens to pay"
    model.requires_grad_(True)
    assert count(model, asked="auto", of=batch(9)) == 1, "every lane would have gradients of the whole model"
    with torch.no_grad():
        assert count(model, asked="auto", of=batch(9)) == 2
    torch.set_num_threads(1)
    with torch.no_grad():
        assert count(model, asked="auto", of=batch(9)) == 1, "nobody to do it"
    assert count(model) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert count(model) == 1


def dropping(model: Any) -> Any:
    return model.train()


def watching(model: Any) -> Any:
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *call: None)
    return model


def changing_gradients(model: Any) -> Any:
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda gradient: 2 * gradient)
    return model


class Unknown(nn.Linear):
    """Might do anything."""


def holding_something_unknown(model: Any) -> Any:
    model.get_base_model().model.layers[1].mlp.extra = Unknown(1, 1)
    return model


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"lora_dropout": 0.5}, dropping),
        ({"use_dora": True}, lambda model: model),
        ({}, watching),
        ({}, changing_gradients),
        ({}, holding_something_unknown),
    ],
)
def test_aside_where_it_would_not_be_the_same(options: Any, change: Callable[[Any], Any], llama: Path) -> None:
    assert count(change(peft_model(llama, **options))) == 1


def test_attention_that_drops_in_training(tmp_path: Path) -> None:
    from residency.testing.tiny_models import write_backbone

    model = peft_model(write_backbone(tmp_path / "llama", dropout=0.1))
    assert count(model) == 2
    assert count(model.train()) == 1


def test_weights_in_four_bits_stay_together(llama: Path) -> None:
    backbone = CausalLM(path=str(llama), quantisation=Quantisation())
    assert count(peft_model(llama, backbone=backbone)) == 1


def test_a_stream_in_lanes(llama: Path, tmp_path: Path) -> None:
    """A whole stream ends at the same weights, but for rounding, and twice at the same bits."""
    from residency.testing.tiny_runs import train
    from table import ADAPTERS

    def end(name: str, lanes: int) -> dict[str, Tensor]:
        adapter = ADAPTERS["lora"].make()
        _, module = train(tmp_path / name / "run", llama, adapter, loading={"lanes": lanes}, steps=3)
        return dict(module.adapter.state(module.model))

    one, two, again = end("one", 1), end("two", 2), end("again", 2)
    assert any(not torch.equal(one[key], two[key]) for key in one), "it was computed apart"
    assert all(torch.equal(two[key], again[key]) for key in two)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)
