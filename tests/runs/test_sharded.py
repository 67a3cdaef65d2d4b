"""Two processes with a part of the frozen base each learn what one process learns with all of it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.cli import call, read_json
from support.rank_commands import command, start, stream_config, wait_for
from support.rank_learning import SINGLE, assert_equal_learning
from support.rank_runs import Group, apart, group
from table import ADAPTERS, MITIGATIONS, OBJECTIVES

pytestmark = pytest.mark.slow

TAKING_PART = [name for name, row in MITIGATIONS.items() if row.make().shardable]

LEARNT_BY = [name for name, row in OBJECTIVES.items() if row.make().shardable]
LORA = [name for name, row in ADAPTERS.items() if row.make().shardable and "quantisation" not in row.loading]


@pytest.fixture(scope="module")
def two() -> Iterator[Group]:
    """Two ranks, started once."""
    with group(2) as found:
        yield found


@pytest.fixture(scope="module")
def config(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny stream with EWC."""
    return stream_config(tmp_path_factory.mktemp("config"), llama)


def test_who_takes_part() -> None:
    """As `docs/devices.md` says."""
    assert [name for name, row in OBJECTIVES.items() if row.make().reads == "completion"] == LEARNT_BY
    assert {*MITIGATIONS} - {*TAKING_PART} == {"source_shielding", "intruder_reduction"}


@pytest.mark.parametrize("mitigation", ["", *TAKING_PART])
def test_with_every_mitigation(mitigation: str, two: Group, llama: Path, tmp_path: Path) -> None:
    assert_equal_learning(two, llama, tmp_path, "lora", *filter(None, [mitigation]), shards=True)


@pytest.mark.parametrize("adapter", LORA)
def test_with_every_kind_of_lora(adapter: str, two: Group, llama: Path, tmp_path: Path) -> None:
    """Dropout is drawn per micro-batch, which must be equally large."""
    assert_equal_learning(two, llama, tmp_path, adapter, shards=True, data={"micro_batch_size": 2})


@pytest.mark.parametrize("objective", LEARNT_BY)
def test_with_every_objective_that_learns_what_to_write(
    objective: str, two: Group, llama: Path, tmp_path: Path
) -> None:
    row = {"objective": OBJECTIVES[objective].make(), "kinds": {"a": "generative", "b": "label"}}
    assert_equal_learning(two, llama, tmp_path, "lora", shards=True, **row)


def test_with_activations_that_are_computed_again(two: Group, llama: Path, tmp_path: Path) -> None:
    loading = {"dtype": "float64", "gradient_checkpointing": True}
    assert_equal_learning(two, llama, tmp_path, "lora", "replay", shards=True, loading=loading)


def started(how: str, config: Path, run: Path) -> subprocess.Popen[str]:
    """So many steps that there is time to kill in the middle of the second stage."""
    ranks, more = (2, ["--config", "fsdp"]) if how == "parts" else (1, [])
    return start(command(config, run, ranks, "--trainer.max_steps=60", *more))


def exported(run: Path, folder: Path) -> dict[str, torch.Tensor]:
    """What other programs load."""
    assert call("export", run, "--output", folder).code == 0
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(("first", "then"), [("parts", "parts"), ("parts", "alone"), ("alone", "parts")])
def test_a_killed_run_goes_on_in_parts_and_whole(first: str, then: str, config: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = started(first, config, run)
    wait_for(run / "stages" / "2-b" / "checkpoint.safetensors", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (run / "results.json").exists()
    resumed = started(then, config, run)
    _, told = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, told
    assert "warn" not in told.lower()
    assert call("fit", "--config", config, "--run_dir", whole, "--trainer.max_steps=60").code == 0
    assert max(apart(whole, run).values()) <= SINGLE
    stages = [read_json(run / "stages" / name / "stage.json") for name in ("1-a", "2-b")]
    assert ["frozen_bytes" in stage for stage in stages] == [how == "parts" for how in (first, then)]
    found, expected = exported(run, tmp_path / "one"), exported(whole, tmp_path / "other")
    assert {*found} == {*expected}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=SINGLE, atol=SINGLE)
