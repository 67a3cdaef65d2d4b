"""Decoder layers as one node step aside where their modules do something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from residency.backbones import CausalLM
from support.autograd_graphs import count_nodes
from support.small_llamas import PLAIN, POSITIONS, ROW, by_modules, nodes, run, saved, small, with_lora


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return saved(small(), tmp_path)


def _hook(tuned: Any) -> None:
    tuned.base_model.model.model.layers[0].self_attn.o_proj.lora_A["default"].register_forward_hook(lambda *_: None)


def _hook_on_part(tuned: Any) -> None:
    tuned.base_model.model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def _hook_on_norm(tuned: Any) -> None:
    tuned.base_model.model.model.layers[0].input_layernorm.register_full_backward_hook(lambda *_: None)


def _train_norm(tuned: Any) -> None:
    tuned.base_model.model.model.layers[0].post_attention_layernorm.weight.requires_grad_()


def _train_weight(tuned: Any) -> None:
    tuned.base_model.model.model.layers[0].self_attn.k_proj.base_layer.weight.requires_grad_()


def _replace(tuned: Any) -> None:
    layer = tuned.base_model.model.model.layers[0]
    layer.mlp.forward = lambda x: type(layer.mlp).forward(layer.mlp, x)


def _checkpoint(tuned: Any) -> None:
    tuned.base_model.model.model.layers[0].gradient_checkpointing = True
    tuned.base_model.model.model.layers[0]._gradient_checkpointing_func = lambda function, *args: function(*args)


@pytest.mark.parametrize(
    "change", [_hook, _hook_on_part, _hook_on_norm, _train_norm, _train_weight, _replace, _checkpoint]
)
def test_a_layer_steps_aside(model: Any, change: Callable[[Any], None]) -> None:
    tuned = with_lora(model)
    before = run(tuned)
    tuned.train()
    change(tuned)
    assert nodes(tuned) == 1
    torch.testing.assert_close(run(tuned), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["q_proj.lora_B", "down_proj.base_layer", "post_attention_layernorm"])
def test_values_that_changed_before_the_backward_pass_are_noticed(model: Any, name: str) -> None:
    tuned = with_lora(model)
    logits = run(tuned)
    with torch.no_grad():
        next(p for n, p in tuned.named_parameters() if name in n and ".0." in n).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_merged_and_disabled_adapters(model: Any) -> None:
    tuned = with_lora(model)
    plain = by_modules(tuned)
    trained = run(tuned)
    with tuned.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(run(tuned), run(plain), rtol=1e-5, atol=1e-5)
        assert (run(tuned) - trained).abs().max() > 1e-2
    tuned.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(run(tuned), trained, rtol=1e-3, atol=1e-3)


def test_dropout_is_left_to_the_modules(model: Any) -> None:
    tuned = with_lora(model, lora_dropout=0.5)
    tuned.train()
    assert nodes(tuned) == 0
    tuned.eval()
    assert nodes(tuned) == 2


def test_padded_batches_go_through_the_modules(model: Any) -> None:
    tuned = with_lora(model)
    ids = ROW.view(2, 6)
    whole = tuned(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert count_nodes(whole.logits, "_LoraLinearBackward") == 21  # seven in each of three layers
    assert count_nodes(whole.logits, "_DecoderLayerBackward") == 0


def test_checkpointed_layers_are_left_to_the_modules(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    model = CausalLM(path=str(tmp_path), gradient_checkpointing=True).load()
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_half_precision_is_left_to_the_modules(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    model = CausalLM(path=str(tmp_path), dtype="bfloat16").load()
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_hidden_states_are_those_of_the_layers(model: Any) -> None:
    found = model(input_ids=ROW, position_ids=POSITIONS, segments=PLAIN, output_hidden_states=True, use_cache=False)
    plain = by_modules(model)(
        input_ids=ROW, position_ids=POSITIONS, segments=PLAIN, output_hidden_states=True, use_cache=False
    )
    assert len(found.hidden_states) == len(plain.hidden_states) == 4
    torch.testing.assert_close(found.hidden_states, plain.hidden_states, rtol=1e-5, atol=1e-5)


def test_a_saved_model_is_as_before(tmp_path: Path) -> None:
    model = small()
    assert isinstance(model, LlamaForCausalLM)
    loaded = saved(model, tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
