"""Runs whose tokens are mapped from a file are the runs that encode them, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from residency.adapters import Full
from residency.domains import training_tokens
from residency.mitigations import Replay
from residency.testing.tiny_runs import train


def outcome(folder: Path, llama: Path, **data: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Scores and weights of a short stream with replay."""
    stream = {"data": data} if data else {}
    record, module = train(folder, llama, Full(), {"replay": Replay(capacity=8)}, steps=5, **stream)
    return record["scores"], dict(module.model.state_dict())


def test_mapped_tokens_train_the_same_weights(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESIDENCY_CACHE", str(tmp_path / "cache"))
    scores, weights = outcome(tmp_path / "plain", llama)
    assert not list((tmp_path / "cache").glob("tokens/*"))
    monkeypatch.setattr(training_tokens, "MANY", 1)
    # The first writes the files; the second finds them, and its workers read them.
    for name, data in (("first", {}), ("mapped", {"num_workers": 1})):
        found, other = outcome(tmp_path / name, llama, **data)
        assert found == scores
        assert all(torch.equal(value, other[key]) for key, value in weights.items())
        assert len(list((tmp_path / "cache").glob("tokens/*.safetensors"))) == 3
