"""A tiny random language model with a byte tokenizer, and tiny domains with transition tables of their own."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

__all__ = ["write_backbone", "write_domain", "write_tokenizer"]


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """One token per byte, plus the end token (which is the padding token too, as in SmolLM2)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.save_pretrained(folder)
    return fast


def write_backbone(
    folder: Path,
    *,
    architecture: str = "llama",
    seed: int = 0,
    dropout: float = 0.0,
    layers: int = 2,
    width: int = 32,
) -> Path:
    """A randomly initialised model of 2 layers and 32 dimensions, in the format of `save_pretrained`."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": 257, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    if architecture == "llama":
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            attention_dropout=dropout,
            tie_word_embeddings=True,
            **common,
        )
        model: Any = LlamaForCausalLM(config)
    elif architecture == "t5":
        # FLAN-T5's form: gated feed-forward, a head of its own.
        sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
        form = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(T5Config(dropout_rate=dropout, **sizes, **buckets, **form, **common))
        model.lm_head.weight = torch.nn.Parameter(torch.randn(257, 32) * 0.1)
        with torch.no_grad():
            for stack in (model.encoder, model.decoder):
                stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
    elif architecture in ("bert", "roberta"):
        # Pretrained encoders, without the head of a classifier.
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
        drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        sizes |= {"num_attention_heads": 4, "max_position_embeddings": 128}
        if architecture == "bert":
            model = BertForMaskedLM(BertConfig(**sizes, **drop, **common))
        else:
            model = RobertaForMaskedLM(RobertaConfig(**sizes, **drop, **common))
    else:
        drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=4, n_positions=256, **drop, **common))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@lru_cache
def _table(name: str) -> dict[str, str]:
    letters = "abcdefghijklmnop"
    shuffled = list(letters)
    random.Random(name).shuffle(shuffled)
    return dict(zip(letters, shuffled, strict=True))


def write_domain(folder: Path, name: str, *, rows: int = 24, kind: str = "generative") -> dict[str, Any]:
    """A domain whose completions follow from the prompts by a substitution of its own; a config for `Jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(f"rows of {name}")
    prompts: set[str] = set()
    while len(prompts) < rows + 12:
        prompts.add("".join(draw.choices("abcdefghijklmnop", k=draw.randint(3, 7))))
    table = _table(name)
    lines = [{"prompt": p, "completion": "".join(table[c] for c in p[:3])} for p in sorted(prompts)]
    if kind == "label":
        lines = [{"prompt": p, "completion": f"{name} {'even' if len(p) % 2 else 'odd one'}"} for p in sorted(prompts)]
    paths = {}
    for split, part in (("train", lines[12:]), ("validation", lines[:4]), ("test", lines[4:12])):
        path = folder / f"{name}-{split}.jsonl"
        text = "".join(json.dumps(line) + "\n" for line in part)
        # Ranks share the file: what is there is not written again while another one reads it.
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
        paths[split] = str(path)
    template = {"prompt": "{prompt}>", "completion": "{completion}", "max_prompt_tokens": 12, "max_tokens": 24}
    return {
        "class_path": "residency.domains.Jsonl",
        "init_args": {**paths, "kind": kind, "template": template},
    }
