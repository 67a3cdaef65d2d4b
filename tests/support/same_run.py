"""Two runs are the same run: scores, weights, states and history, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import torch

from residency.core.tensor_files import load_tree

__all__ = ["assert_equal_trees", "assert_same_run"]


def assert_same_run(one: Path, other: Path) -> None:
    """Scores, per-example scores, weights, mitigations' state and history are bit-equal."""
    first, second = _record(one), _record(other)
    assert first["scores"] == second["scores"]
    assert first["summary"] == second["summary"]
    stages = sorted(path.name for path in (one / "stages").iterdir())
    assert stages == sorted(path.name for path in (other / "stages").iterdir())
    for stage in stages:
        frames = [pl.read_parquet(run / "stages" / stage / "scores.parquet") for run in (one, other)]
        assert frames[0].equals(frames[1]), stage
        if stage != "0-base":
            trees = [load_tree(run / "stages" / stage / "state.safetensors") for run in (one, other)]
            assert_equal_trees(trees[0]["weights"], trees[1]["weights"], stage)
            assert_equal_trees(trees[0]["mitigations"], trees[1]["mitigations"], stage)
    histories = [[_without_time(line) for line in _lines(run)] for run in (one, other)]
    assert histories[0] == histories[1]
    assert not list(other.rglob("*.tmp")), "temporary files were left behind"


def assert_equal_trees(one: Any, other: Any, where: str) -> None:
    """Nested mappings of tensors, bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
        return
    assert set(one) == set(other), where
    for key in one:
        assert_equal_trees(one[key], other[key], f"{where}/{key}")


def _record(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def _without_time(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("seconds", "time")}
