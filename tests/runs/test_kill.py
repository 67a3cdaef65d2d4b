"""`kill -9` at any moment, then the same command: bit for bit the uninterrupted run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from residency.core.tensor_files import load_tree
from support.tiny_runs import Kill, in_child

COMBINATIONS = [[], ["replay"], ["ewc"], ["ewc_online"], ["weight_mixing"], ["ewc", "replay", "weight_mixing"]]
# Before the first checkpoint, between two, in a later stage; and inside the writes that end a stage.
KILLS = [
    Kill(stage=1, step=1),
    Kill(stage=2, step=3),
    Kill(stage=3, step=2),
    Kill(write=4, moment="middle"),
    Kill(write=3, moment="after"),
    Kill(write=2, moment="before"),
]


# Everything at once in `make test`, each by itself in `make test-slow`.
EACH = [pytest.param(names, marks=() if len(names) == 3 else pytest.mark.slow) for names in COMBINATIONS]


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("mitigations", EACH, ids=lambda m: "+".join(m) or "none")
def test_killed_run_equals_the_uninterrupted_one(
    adapter: str, mitigations: list[str], llama_dropout: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_child(whole, llama_dropout, adapter, mitigations) == 0
    deaths = [in_child(killed, llama_dropout, adapter, mitigations, kill) for kill in KILLS]
    assert deaths.count(-9) >= 4, f"the run was to be killed again and again, exit codes {deaths}"
    assert not (killed / "results.json").exists()
    assert in_child(killed, llama_dropout, adapter, mitigations) == 0
    assert_same_run(whole, killed)


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
    return {key: value for key, value in line.items() if key != "seconds"}
