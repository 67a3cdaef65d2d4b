"""Tiny models of many architectures, and what becomes of each: a layout, or a refusal.

A row says what differs from the common sizes; `expected` is `packed`, `padded` (the model runs its own attention, or a
part of it carries something from one text to the next) or a piece of the sentence that refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from residency.testing.tiny_models import write_tokenizer

__all__ = ["ROWS", "Row", "write_architecture"]

VOCABULARY = 320
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_STATES: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_state": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 4,
    "n_groups": 1,
}
_OLD: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256}
_ROTARY = _OLD | {"rotary_dim": 4}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture.

    Args:
        kind: `model_type` of transformers.
        expected: What becomes of it.
        sizes: What differs from the common sizes.
        bare: Take none of the common sizes but the token ids.
        without: Adapters that are refused on it: PEFT has no DoRA for experts that are one tensor, and wraps no router
            that gives a tuple; quantisation that leaves the experts as they are is refused.
        left_out: Adapters that transformers alone cannot run on it.
        fast: Whether it is compared in `make test`; all are in .ci/run.
    """

    kind: str
    expected: str
    sizes: dict[str, Any] = field(default_factory=dict)
    bare: bool = False
    without: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    fast: bool = False

    @property
    def refused(self) -> bool:
        """Whether it must not run."""
        return self.expected not in ("packed", "padded")


def _rows(expected: str, *kinds: str, without: tuple[str, ...] = (), fast: bool = False) -> dict[str, Row]:
    return {kind: Row(kind=kind, expected=expected, without=without, fast=fast) for kind in kinds}


_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_NOT_CAUSAL = "is not causal"
_ROUTED = ("dora", "qlora")

ROWS: dict[str, Row] = {
    **_rows("packed", "llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma2", fast=True),
    **_rows("packed", "granite_swa", "phi3", "olmo2", fast=True),
    **_rows("packed", "gpt_oss", without=("qlora",), fast=True),
    **_rows("packed", "mixtral", "glm4_moe", without=_ROUTED, fast=True),
    **_rows("packed", "apertus", "arcee", "bitnet", "cohere", "cohere2", "cwm", "diffllama", "ernie4_5", "exaone4"),
    **_rows("packed", "flint", "gemma", "glm", "glm4", "gpt_bigcode", "granite", "helium", "hunyuan_v1_dense", "jais2"),
    **_rows("packed", "mimo_v2_flash", "ministral", "modernbert-decoder", "nanochat", "olmo", "olmo3", "opt"),
    **_rows("packed", "persimmon", "phi", "seed_oss", "smollm3", "starcoder2", "vaultgemma"),
    **_rows("packed", "aria_text", "granitemoe", "granitemoe_swa", "granitemoeshared", "jetmoe", without=("qlora",)),
    **_rows("packed", "afmoe", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", without=_ROUTED),
    **_rows("packed", "hunyuan_v1_moe", "minimax_m2", "olmoe", "qwen3_moe", without=_ROUTED),
    **_rows("packed", "qwen2_moe", without=("qlora",)),
    **_rows("packed", "phimoe", without=("lora", "dora", "qlora")),
    "gemma3": Row(kind="gemma3_text", expected="packed", sizes={"num_hidden_layers": 6}),
    "phi-partial": Row(kind="phi3", expected="packed", sizes={"partial_rotary_factor": 0.5}, fast=True),
    "llama-linear-rope": Row(
        kind="llama",
        expected="packed",
        sizes={"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "deepseek_v2": Row(kind="deepseek_v2", expected="packed", sizes=_LATENT, without=_ROUTED),
    "deepseek_v3": Row(kind="deepseek_v3", expected="packed", sizes=_LATENT, without=_ROUTED),
    "llama4": Row(
        kind="llama4_text",
        expected="padded",
        sizes={"num_hidden_layers": 4},
        without=("lora", "dora", "qlora"),
        fast=True,
    ),
    "lfm2": Row(
        kind="lfm2",
        expected="padded",
        sizes={"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        fast=True,
    ),
    "recurrent_gemma": Row(
        kind="recurrent_gemma",
        expected="padded",
        sizes={"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 8},
    ),
    "qwen3_next": Row(kind="qwen3_next", expected="padded", sizes=_LINEAR, without=_ROUTED),
    "qwen3_5": Row(kind="qwen3_5_text", expected="padded", sizes=_LINEAR),
    "bamba": Row(kind="bamba", expected="padded", sizes={"attn_layer_indices": [1]}),
    "gptj": Row(kind="gptj", expected="padded", sizes=_ROTARY, bare=True),
    "codegen": Row(kind="codegen", expected="padded", sizes=_ROTARY, bare=True),
    "gpt_neo": Row(
        kind="gpt_neo",
        expected="padded",
        sizes={
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 256,
        },
        bare=True,
    ),
    "falcon": Row(
        kind="falcon",
        expected="padded",
        sizes={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        without=("qlora",),
        bare=True,
    ),
    "rwkv": Row(kind="rwkv", expected="padded", left_out=("qlora",)),
    **_rows("padded", "mamba", without=("lora", *_ROUTED)),  # PEFT itself refuses its out_proj
    **_rows("padded", "minimax", without=_ROUTED),
    "jamba": Row(
        kind="jamba", expected="padded", sizes={"attn_layer_period": 2, "attn_layer_offset": 1}, without=("qlora",)
    ),
    **_rows("padded", "bloom", "doge", "mpt", "nemotron", "stablelm", "xglm"),
    **_rows(_NOT_CAUSAL, "bert", fast=True),
    **_rows(_NOT_CAUSAL, "roberta", "electra", "camembert", "ernie", "roformer"),
}


def _config(row: Row) -> Any:
    made = CONFIG_MAPPING[row.kind]
    known, renamed = made(), getattr(made, "attribute_map", {})
    common = {k: v for k, v in _SIZES.items() if not row.bare or k == "vocab_size" or k.endswith("token_id")}
    common |= {} if row.bare else _EXPERTS | _STATES
    sizes = {renamed.get(k, k): v for k, v in common.items() if hasattr(known, k)}
    return made(**sizes | {renamed.get(k, k): v for k, v in row.sizes.items()})


def write_architecture(folder: Path, row: Row) -> Path:
    """A random model in the format of `save_pretrained`; no weight is 0 or 1, so that nothing hides behind it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(row))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
