"""Hashes that tell whether two backbones are the same."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

__all__ = ["tokenizer_fingerprint", "weights_fingerprint"]

# One text that touches case, digits, white space, code, umlauts, another script and an emoji: tokenizers that differ
# anywhere a user would notice differ here (pitfalls H8: one name resolved to two classes with different ids).
_PROBE = "A resident learns 3,141 things; def f(x):\n\treturn x ** 2  # naïve Ärzte — 心臓 🫀 <b>don't</b>"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over the ids of a fixed text, the vocabulary's size and the special ids."""
    ids = tokenizer(_PROBE).input_ids
    parts = [ids, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over the safetensors files and the config of a model folder."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        digest.update(path.name.encode())
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
