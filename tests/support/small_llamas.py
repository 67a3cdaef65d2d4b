"""Small Llamas as a backbone loads them, with and without layers that run as one node."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from residency.backbones import CausalLM
from residency.backbones.kernels.lora import fuse_lora
from support.autograd_graphs import count_nodes

ROW = torch.arange(1, 13)[None]
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 2, 3, 4]])
# Five tokens, and two continuations of two and three tokens behind two common ones.
BRANCHED = ((5,), (2, 2, 3))
PLAIN = ((5,), (7,))


def saved(model: Any, folder: Path) -> Any:
    """The model as a backbone loads it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return CausalLM(path=str(folder)).load()


def small(kind: type[PretrainedConfig] = LlamaConfig, **options: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return AutoModelForCausalLM.from_config(kind(**{**sizes, **options}))


def with_lora(model: Any, **options: Any) -> PeftModel:
    chosen = {"r": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    tuned = get_peft_model(model, LoraConfig(**chosen))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=draw)
    fuse_lora(tuned)
    return tuned  # type: ignore[no-any-return]


def run(model: Any, segments: Any = BRANCHED) -> Tensor:
    out: Tensor = model(input_ids=ROW, position_ids=POSITIONS, attention_mask=None, segments=segments, use_cache=False)
    return out.logits  # type: ignore[attr-defined, no-any-return]


def nodes(model: Any) -> int:
    """Layers that were one node of the graph of one pass."""
    return count_nodes(run(model), "_DecoderLayerBackward")


def by_modules(model: Any) -> Any:
    """The same model with the layers' own forward."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if "self_attn" in module._modules:
            vars(module).pop("forward", None)
    return plain
