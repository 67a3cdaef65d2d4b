"""Write `states.zip` with the code of commit 91a4eba (before the modules moved), its own table and its own harness.

git worktree add BEFORE 91a4eba
PYTHONPATH=BEFORE/src:BEFORE/tests python tests/golden/write_states.py tests/golden/states.zip
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from paired import Pairs
from residency.storage import save_tree
from tiny import write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from table import ADAPTERS, MITIGATIONS

LORA = "rslora"
WIDE = ("vblora",)
"""Adapters that need a model of 32 dimensions; the others have 16."""


def backbone(folder: Path, width: int) -> Path:
    """The tiny model of `residency.testing.tiny_models.write_backbone`."""
    torch.manual_seed(0)
    special = {"vocab_size": 257, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**special, **sizes, **more)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def summary(weights: dict[str, torch.Tensor], *, lora: bool) -> dict[str, Any]:
    """Of all weights together, and of the products B A of LoRA: their norm, and 64 values spread evenly over them."""
    tensors = [weights[name].detach().double() for name in sorted(weights) if weights[name].is_floating_point()]
    pairs = [(name, name.replace("lora_A", "lora_B")) for name in sorted(weights) if "lora_A" in name]
    factors = [weights[b].detach().double() @ weights[a].detach().double() for a, b in pairs] if lora else []
    products = _seen(factors) if lora else None
    return {"tensors": len(weights), "weights": _seen(tensors), "products": products}


def _seen(tensors: list[torch.Tensor]) -> list[float]:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    places = torch.linspace(0, len(flat) - 1, 64).long()
    return [float(flat.norm()), *flat[places].tolist()]


def main(target: Path) -> None:
    """Every adapter alone, every mitigation on LoRA: the stored first stage, and what the second makes of it."""
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp())
    pairs = {width: Pairs(backbone(work / str(width), width), work / f"pairs-{width}") for width in (16, 32)}
    rows = [(f"adapter/{name}", name, {}) for name in ADAPTERS]
    rows += [(f"mitigation/{name}", LORA, {name: row}) for name, row in MITIGATIONS.items()]
    expected = {}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for row, adapter, mitigations in rows:
            source = pairs[32 if adapter in WIDE else 16]
            torch.manual_seed(0)
            module = source.module(adapter, {name: mitigation.make() for name, mitigation in mitigations.items()})
            run = source.train(adapter, module)
            save_tree(work / "state.safetensors", run.between)
            archive.write(work / "state.safetensors", f"{row}.safetensors")
            expected[row] = summary(run.final["weights"], lora=adapter == LORA)
        archive.writestr("expected.json", json.dumps(expected))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
