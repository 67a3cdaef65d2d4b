"""What adapters that grow over a stream refuse at once, and what a stage that is begun twice leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from residency.adapters import SLAO, IncLoRA, InfLoRA
from residency.adapters.algebra.dual_gpm import Memory, directions
from residency.adapters.algebra.orthogonality import Orthogonality
from residency.core.errors import UserError
from support.stages_without_trainer import observing, stage
from support.tuned_models import attach


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["q_proj"], "r": 3, **options})


def test_slao_needs_as_many_inputs_as_rows(llama: Path) -> None:
    with pytest.raises(UserError, match=r"rank 40 on a layer with 32 inputs.*\n.*\n.*r <= 32"):
        attach(llama, SLAO(config=config(r=40)))


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}])
def test_blocks_that_are_no_sum_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"IncLoRA with {next(iter(options))}"):
        IncLoRA(config=config(**options))


@pytest.mark.filterwarnings("ignore:Model has.*tie_word_embeddings")
def test_inflora_on_an_embedding_is_refused(llama: Path) -> None:
    with pytest.raises(UserError, match=r"on the embedding .*embed_tokens"):
        attach(llama, InfLoRA(config=config(target_modules=["embed_tokens"])))


def test_negative_strengths_are_refused() -> None:
    with pytest.raises(UserError, match="decay -1"):
        SLAO(config=config(), decay=-1)
    for options in ({"strength": -0.5}, {"shrinkage": -0.5}):
        with pytest.raises(UserError, match="negative penalty"):
            Orthogonality(**options)


def test_a_stage_that_is_begun_twice_begins_anew(llama: Path) -> None:
    adapter = IncLoRA(config=config())
    model = attach(llama, adapter)
    states = []
    for dirty in (False, True):
        torch.manual_seed(7)
        adapter.begin_stage(model, stage(1), observing(model))
        states.append({name: tensor.clone() for name, tensor in adapter.state(model).items()})
        if not dirty:
            with torch.no_grad():
                for leaf in adapter.trainable(model).values():
                    leaf.add_(1.0)
    assert {*states[0]} == {*states[1]}
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_directions_are_orthonormal_where_the_inputs_have_few() -> None:
    torch.manual_seed(0)
    used = torch.linalg.qr(torch.randn(12, 5)).Q
    inputs = torch.randn(2, 12)
    rows = directions(inputs.T @ inputs, Memory(used, False), rank=4)
    assert rows.shape == (4, 12)
    torch.testing.assert_close(rows @ rows.T, torch.diag((rows.norm(dim=1) > 0.5).float()), rtol=0, atol=1e-5)
    assert float((rows @ used).abs().max()) < 1e-5
    assert (rows.norm(dim=1) > 0.5).sum() >= 2
