"""Freezing: which parameters move, tied weights, and patterns that match nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from residency.adapters import Freeze
from residency.adapters.freeze import bottom_blocks
from residency.backbones import CausalLM, Quantisation
from residency.backbones.structure import blocks, embeddings, names_of
from residency.core.errors import UserError
from residency.core.tensors import snapshot
from residency.testing.tiny_runs import train


def moving(folder: Path, **options: Any) -> set[str]:
    model = Freeze(**options).attach(CausalLM(path=str(folder)).load())
    return {name for name, p in model.named_parameters() if p.requires_grad}


def everything(folder: Path) -> set[str]:
    return {name for name, _ in CausalLM(path=str(folder)).load().named_parameters()}


def test_structure_of_two_architectures(llama: Path, gpt2: Path) -> None:
    for folder, stack, tables in (
        (llama, "model.layers", {"model.embed_tokens.weight"}),
        (gpt2, "transformer.h", {"transformer.wte.weight", "transformer.wpe.weight"}),
    ):
        model = CausalLM(path=str(folder)).load()
        assert list(blocks(model)) == [f"{stack}.0", f"{stack}.1"]
        assert embeddings(model) == tables
        assert any("lm_head.weight" in aliases for aliases in names_of(model).values())
    with pytest.raises(UserError, match="no stack of blocks"):
        blocks(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("bottom", "count"), [(0, 0), (3, 3), (12, 12), (0.5, 6), (0.3, 4), (1.0, 12), (0.0, 0)])
def test_a_count_or_a_share(bottom: int | float, count: int) -> None:
    assert bottom_blocks(bottom, 12) == count


@pytest.mark.parametrize("bottom", [-1, 13, 1.5, -0.5])
def test_too_many_blocks(bottom: int | float) -> None:
    with pytest.raises(UserError, match=r"bottom = .* 12 blocks"):
        bottom_blocks(bottom, 12)


def test_what_moves(llama: Path, gpt2: Path) -> None:
    names = everything(llama)
    lowest = {name for name in names if ".layers.0." in name}
    assert moving(llama) == names
    assert moving(llama, bottom=1) == moving(llama, bottom=0.5) == names - lowest
    assert moving(llama, freeze=["norm", r"\.1\.mlp"]) == {n for n in names if "norm" not in n and ".1.mlp" not in n}
    assert moving(llama, train_only=["mlp"]) == {name for name in names if "mlp" in name}
    assert moving(llama, train_only=["mlp"], bottom=1) == {name for name in names if ".1.mlp" in name}
    assert moving(llama, bottom=1, train_embeddings=False) == names - lowest - {"model.embed_tokens.weight"}
    tables = {"transformer.wte.weight", "transformer.wpe.weight"}
    assert moving(gpt2, train_embeddings=False) == everything(gpt2) - tables


def test_a_tied_head_goes_by_both_of_its_names(llama: Path) -> None:
    tied = "model.embed_tokens.weight"
    assert moving(llama, freeze=["lm_head"]) == moving(llama, freeze=["embed_tokens"]) == everything(llama) - {tied}
    assert moving(llama, train_only=["lm_head"]) == {tied}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ["mpl"]}, r"model\.adapter\.freeze: 'mpl' matches none of .* names"),
        ({"train_only": ["mlp", "atention"]}, r"model\.adapter\.train_only: 'atention' matches none"),
        ({"freeze": ["(mlp"]}, r"'\(mlp' is no regular expression"),
        ({"train_only": ["lm_head"], "train_embeddings": False}, "freezes all .* parameters"),
        ({"bottom": 3}, "a model with 2 blocks"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str, llama: Path) -> None:
    with pytest.raises(UserError, match=message):
        moving(llama, **options)


def test_a_quantised_base_can_train_what_is_not_quantised(llama: Path) -> None:
    base = CausalLM(path=str(llama), quantisation=Quantisation())
    model = Freeze(train_only=["norm"]).attach(base.load())
    assert all("norm" in name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(UserError, match="quantised backbone"):
        Freeze(bottom=1).attach(base.load())


def test_frozen_weights_stay_bit_identical_under_weight_decay(gpt2: Path, tmp_path: Path) -> None:
    adapter = Freeze(bottom=1, freeze=["ln_f"], train_embeddings=False)
    before = snapshot(dict(adapter.attach(CausalLM(path=str(gpt2)).load()).named_parameters()))
    _, module = train(tmp_path / "run", gpt2, adapter)
    same = {name for name, p in module.model.named_parameters() if torch.equal(p, before[name])}
    assert same == {*before} - {*adapter.trainable(module.model)}
    assert {n for n in same if ".h." in n} == {n for n in before if ".h.0." in n}
