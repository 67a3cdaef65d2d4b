"""Random sequence-to-sequence models whose answers end: what is random alone hardly ever writes its end token."""

from __future__ import annotations

import json
from pathlib import Path

from residency.testing.tiny_models import write_backbone

__all__ = ["write_translator"]


def write_translator(folder: Path) -> Path:
    """A T5 whose generation config makes the end token more likely with every token behind the fourth."""
    model = write_backbone(folder, architecture="t5")
    path = model / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "exponential_decay_length_penalty": [4, 2.0]}))
    return model
