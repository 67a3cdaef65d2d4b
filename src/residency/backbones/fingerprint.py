"""Hashes that tell whether two backbones are the same: of every file that is read from a model's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["tokenizer_fingerprint", "weights_fingerprint"]

# One text that touches case, digits, white space, code, umlauts, another script and an emoji: tokenizers that differ
# anywhere a user would notice differ here (pitfalls H8: one name resolved to two classes with different ids).
_PROBE = "A resident learns 3,141 things; def f(x):\n\treturn x ** 2  # naïve Ärzte — 心臓 🫀 <b>don't</b>"

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.jinja",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "spiece*",
)


def tokenizer_fingerprint(tokenizer: Any, folder: Path) -> str:
    """SHA-256 over the tokenizer's files, the ids of a fixed text, the vocabulary and the special ids.

    Args:
        tokenizer: As it was loaded; the same files give other ids in another class.
        folder: Where its files lie.
    """
    ids = tokenizer(_PROBE).input_ids
    special = [ids, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return _digest(folder, _TOKENIZER, json.dumps(special).encode())


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over the weights, their index and the configs of a model folder."""
    return _digest(folder, _WEIGHTS)


def _digest(folder: Path, patterns: Iterable[str], *more: bytes) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        digest.update(path.name.encode())
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    for part in more:
        digest.update(part)
    return digest.hexdigest()
