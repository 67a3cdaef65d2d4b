"""The loss without its logits: the same values and gradients, in chunks, and only where the head comes last."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.backbones.kernels import head as kernel
from residency.backbones.kernels.head import bare_head, free_head, head_nll, without_head
from residency.core.batching import make_batch
from residency.core.types import Batch, Example, Layout, Stage
from residency.engine.module import ContinualModule
from residency.mitigations import EWC, SelfDistillation
from residency.objectives import SFT
from residency.objectives.sft import token_nll

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
EXAMPLES = [
    Example.of(domain="a", row="1", prompt=tuple(range(1, 9)), completion=(4, 5, 6)),
    Example.of(domain="a", row="2", prompt=tuple(range(3, 6)), completion=(7,)),
    Example.of(domain="a", row="3", prompt=(2,), completion=(9, 9, 1, 2)),
]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def targets(rows: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(5))


def batch(layout: Layout = "packed") -> Batch:
    return make_batch(EXAMPLES, layout=layout)


@pytest.mark.parametrize("trained", [(), (1,), (1, 2)], ids=["frozen", "weight", "weight and bias"])
@pytest.mark.parametrize(("chunk", "keep"), [(10**6, 10**6), (40, 10**6), (40, 0)], ids=["whole", "chunks", "again"])
def test_gradients_by_finite_differences(
    chunk: int, keep: int, trained: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_CHUNK", chunk)
    monkeypatch.setattr(kernel, "_KEEP", keep)
    inputs = [draw(7, 4), draw(11, 4, seed=1), draw(11, seed=2)]
    for place in (0, *trained):
        inputs[place].requires_grad_()
    y = targets(7, 11)
    expected = F.cross_entropy(F.linear(*inputs), y, reduction="none")
    torch.testing.assert_close(head_nll(*inputs, y), expected)
    assert torch.autograd.gradcheck(lambda *given: head_nll(*given, y), inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_lower_precision(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_CHUNK", 200)
    h, w, y = draw(9, 8, dtype=dtype).requires_grad_(), draw(50, 8, seed=1, dtype=dtype), targets(9, 50)
    found = head_nll(h, w, None, y)
    assert found.dtype == torch.float32
    slope = torch.autograd.grad(found.mean(), h)[0]
    plain = F.cross_entropy(F.linear(h, w).float(), y)
    torch.testing.assert_close(found.mean(), plain, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(plain, h)[0]
    torch.testing.assert_close(slope, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_large_logits_neither_overflow_nor_vanish() -> None:
    h = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    found = head_nll(h, weight, None, torch.tensor([0, 0]))
    assert found.tolist() == [0.0, 2e4]
    found.sum().backward()
    assert h.grad is not None
    assert h.grad.tolist() == [[0.0], [-2.0]]


def test_no_more_logits_at_once_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    original = F.linear

    def counted(x: Tensor, *rest: Any) -> Tensor:
        rows.append(len(x))
        return original(x, *rest)

    monkeypatch.setattr(kernel.F, "linear", counted)
    monkeypatch.setattr(kernel, "_CHUNK", 300)
    head_nll(draw(20, 4).requires_grad_(), draw(100, 4), None, targets(20, 100)).sum().backward()
    assert sum(rows) == 20, "frozen: the forward pass only"
    assert max(rows) <= 3
    assert min(rows) >= 2, "shared out evenly"
    rows.clear()
    monkeypatch.setattr(kernel, "_KEEP", 0)
    head_nll(draw(20, 4), draw(100, 4).requires_grad_(), None, targets(20, 100)).sum().backward()
    assert (sum(rows), max(rows)) == (40, 3), "trained: both passes"


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("backbone", ["llama", "gpt2", "mistral_folder"])
def test_a_model_without_its_head(backbone: str, layout: Layout, request: pytest.FixtureRequest) -> None:
    model_folder = request.getfixturevalue(backbone)
    owner = CausalLM(path=str(model_folder))
    model = owner.load()
    head = bare_head(model)
    assert head is not None
    leaves = list(model.parameters())
    pairs = []
    for nll in (owner.nll(model, batch(layout)), token_nll(owner.logits(model, batch(layout)), batch(layout).targets)):
        gradients = torch.autograd.grad(nll.square().sum(), leaves, allow_unused=True)
        pairs.append([nll.detach(), *(g for g in gradients if g is not None)])
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-5)
    assert owner.logits(model, batch(layout)).shape[1] == head.out_features, "logits are logits again"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0)),
        lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    ],
    ids=["softcap", "scale"],
)
def test_what_follows_the_head_keeps_it(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.arange(5)[None]
    before = model(input_ids=ids).logits
    assert not free_head(model)
    assert bare_head(model) is None
    with without_head():
        assert torch.equal(model(input_ids=ids).logits, before)


def test_a_model_that_cuts_its_vocabulary_keeps_its_head(llama: Path) -> None:
    model = CausalLM(path=str(llama)).load()
    del model.lm_head.forward
    original = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        out.logits = out.logits[..., :200]
        return out

    model.forward = forward.__get__(model)
    assert not free_head(model)
    assert "forward" not in vars(model.lm_head)


def test_who_wraps_or_watches_the_head_gets_it(mistral_folder: Path) -> None:
    owner = CausalLM(path=str(mistral_folder))
    model = owner.load()
    assert bare_head(copy.deepcopy(model)) is not bare_head(model)
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert bare_head(model) is None
    handle.remove()
    assert bare_head(model) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert bare_head(model) is None
    plain = owner.logits(model, batch())
    wrapped = get_peft_model(model, LoraConfig(target_modules=["lm_head", "q_proj"]))
    assert bare_head(wrapped) is None
    found = owner.nll(wrapped, batch())
    torch.testing.assert_close(found, token_nll(plain, batch().targets), rtol=0, atol=1e-5)
    assert bare_head(CausalLM(path=str(mistral_folder), dtype="float16").load()) is None


def test_a_copy_is_trained_by_itself(llama: Path) -> None:
    owner = CausalLM(path=str(llama))
    model = owner.load()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert not torch.allclose(owner.nll(model, batch()), owner.nll(other, batch()))
    owner.nll(other, batch()).sum().backward()
    assert model.lm_head.weight.grad is None
    assert other.lm_head.weight.grad is not None


def test_logits_for_those_who_read_them(llama: Path) -> None:
    def module(**mitigations: Any) -> ContinualModule:
        parts: dict[str, Any] = {"backbone": CausalLM(path=str(llama)), "adapter": lora(r=2), "objective": SFT()}
        made = ContinualModule(**parts, mitigations=mitigations)
        made.build(seed=0)
        return made

    def outputs(made: ContinualModule, index: int) -> Any:
        made.stage = Stage(index=index, domain="a", stages=2, seed=0, steps=1, batch_size=3)
        return made.objective(made.trained_forward, batch(made.layout), None)

    plain = outputs(module(), 1)
    assert plain.logits is None
    assert outputs(module(ewc=EWC(strength=1.0)), 1).logits is None
    distilled = module(sd=SelfDistillation())
    assert outputs(distilled, 0).logits is None, "it takes part from the second domain on"
    read = outputs(distilled, 1)
    assert read.logits is not None
    torch.testing.assert_close(read.loss, plain.loss, rtol=0, atol=1e-6)
    assert outputs(module(sd=SelfDistillation(strength=0.0)), 1).logits is None
