"""Every architecture of the table against plain transformers and PEFT: likelihoods, and the gradient of every leaf."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from residency.adapters import Full, Peft
from residency.backbones import CausalLM, Quantisation
from residency.backbones.layout import choose_layout
from residency.backbones.quantisation import forbid_repacking
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Example, Layout
from support.architectures import ROWS, write_architecture

Plain = Callable[[], nn.Module]

_EXAMPLES = [
    Example.of(domain="x", row="0", prompt=(7, 30, 9, 201), completion=tuple(range(40, 57))),
    Example.of(domain="x", row="1", prompt=tuple(range(80, 95)), completion=(5, 6, 7, 0)),
    Example.of(domain="x", row="2", prompt=(3,), completion=(250, 19)),
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model of a row, written when it is first asked for."""
    known: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in known:
            known[name] = write_architecture(tmp_path_factory.mktemp("model"), ROWS[name])
        return known[name]

    return folder


def _cases() -> list[Any]:
    found = []
    for name, row in ROWS.items():
        marks = [] if row.fast else [pytest.mark.pairs]
        for adapter in () if row.refused else ("lora", "full", "dora", "qlora"):
            if adapter in row.left_out:
                continue
            rest = marks if adapter in ("lora", "full") else [pytest.mark.pairs]
            found.append(pytest.param(name, adapter, marks=rest, id=f"{name}-{adapter}"))
    return found


@pytest.mark.parametrize(("name", "adapter"), _cases())
def test_likelihoods_and_gradients_are_those_of_plain_transformers(
    name: str, adapter: str, folder_of: Callable[[str], Path]
) -> None:
    """In every layout that is used: 1e-5 for likelihoods, 1e-4 of the largest gradient for every leaf."""
    row, folder = ROWS[name], folder_of(name)
    backbone = CausalLM(path=str(folder), quantisation=Quantisation() if adapter == "qlora" else None)
    if adapter in row.without:
        with pytest.raises(UserError):
            choose_layout("auto", backbone, _attached(backbone.load(), adapter))
        return
    model = _attached(backbone.load(), adapter)
    plain = _plain(folder, adapter)
    _same_leaves(model, plain)
    expected, gradients = _read_plain(plain)
    assert ("packed" if not backbone.packing_problem() else "padded") == row.expected, backbone.verdict
    for layout in ("padded", "packed") if row.expected == "packed" else ("padded",):
        model.eval().zero_grad()
        found = backbone.nll(model, make_batch(_EXAMPLES, layout=layout))  # type: ignore[arg-type]
        assert ((found.detach() - expected).abs() <= 1e-5 * expected.clamp_min(1)).all(), layout
        found.mean().backward()  # type: ignore[no-untyped-call]
        for leaf, parameter in model.named_parameters():
            if parameter.requires_grad:
                got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                assert (got - gradients[leaf]).abs().max() <= 1e-4 * _largest(gradients), f"{layout}: {leaf}"


def _attached(model: nn.Module, adapter: str) -> nn.Module:
    own = Full() if adapter == "full" else Peft(config=_lora(adapter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT remarks on GPT-2's transposed layers and on experts
        return _stirred(own.attach(model))


def _lora(adapter: str) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", use_dora=adapter == "dora")


def _stirred(model: nn.Module) -> nn.Module:
    """B of LoRA starts at zero, where A has no gradient."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model


def _plain(folder: Path, adapter: str) -> nn.Module:
    options: dict[str, Any] = {"dtype": torch.float32}
    if adapter == "qlora":
        double = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        double.bnb_4bit_compute_dtype = torch.float32
        options |= {"quantization_config": double, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    forbid_repacking(model)
    if adapter == "full":
        return model  # type: ignore[no-any-return]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _stirred(get_peft_model(model, _lora(adapter))).eval()


def _same_leaves(model: nn.Module, plain: nn.Module) -> None:
    leaves = {name for name, p in model.named_parameters() if p.requires_grad}
    assert leaves == {name for name, p in plain.named_parameters() if p.requires_grad}
    assert leaves


def _read_plain(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Each text alone, without padding."""
    losses = []
    for example in _EXAMPLES:
        ids = torch.tensor([[*example.prompt, *example.completion]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(example.prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits.float(), ids[0, len(example.prompt) :], reduction="none"))
    nll = torch.cat(losses)
    nll.mean().backward()  # type: ignore[no-untyped-call]
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return nll.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves.items()}


def _largest(gradients: dict[str, Tensor]) -> float:
    return max(float(gradient.abs().max()) for gradient in gradients.values())


@pytest.mark.parametrize("name", [pytest.param(n, id=n) for n, row in ROWS.items() if row.refused])
def test_what_is_no_causal_model_is_refused(name: str, folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=ROWS[name].expected):
        CausalLM(path=str(folder_of(name))).load()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ("gemma2", "gpt_oss", "mistral") else [pytest.mark.pairs], id=n)
        for n, row in ROWS.items()
        if row.expected == "packed"
    ],
)
def test_packed_generation_writes_what_plain_transformers_does(name: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(name)
    backbone = CausalLM(path=str(folder))
    model, plain = backbone.load(), _plain(folder, "full")
    prompts = [example.prompt for example in _EXAMPLES]
    found = backbone.generate(model, prompts, max_new_tokens=12, layout="packed")
    for prompt, new in zip(prompts, found, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 12:
                token = int(plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
                if token == 0:
                    break
                ids.append(token)
        assert new == ids[len(prompt) :]


_FEW = ("llama", "gpt2", "bloom")  # positions that turn, that are learnt, that are distances; the others are pairs


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in _FEW else [pytest.mark.pairs], id=n)
        for n, row in ROWS.items()
        if not row.refused
    ],
)
def test_a_row_of_a_batch_is_continued_as_it_is_alone(
    name: str, layout: Layout, folder_of: Callable[[str], Path]
) -> None:
    """Greedy ids of ragged prompts, padded on their left, are those of transformers' own `generate` on each."""
    folder = folder_of(name)
    backbone = CausalLM(path=str(folder))
    model, plain = backbone.load(), _plain(folder, "full")
    prompts = [example.prompt for example in _EXAMPLES]
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=0)
    found = backbone.generate(model, prompts, max_new_tokens=12, layout=layout)
    for prompt, new in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        alone = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)  # type: ignore[operator]
        wanted = alone[0, len(prompt) :].tolist()
        assert new == (wanted[: wanted.index(0)] if 0 in wanted else wanted)
