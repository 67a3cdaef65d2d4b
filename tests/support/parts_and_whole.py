"""A run whose processes have parts of the weights, killed, goes on with other processes, or alone with all of them."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file

from support.cli import call, read_json
from support.rank_commands import command, start, wait_for
from support.rank_learning import SINGLE
from support.rank_runs import apart

__all__ = ["HOW", "assert_goes_on"]

HOW = [("parts", "parts"), ("parts", "alone"), ("alone", "parts")]


def _started(how: str, config: Path, run: Path) -> subprocess.Popen[str]:
    """So many steps that there is time to kill in the middle of the second stage."""
    ranks, more = (2, ["--config", "fsdp"]) if how == "parts" else (1, [])
    return start(command(config, run, ranks, "--trainer.max_steps=60", *more))


def _exported(run: Path, folder: Path) -> dict[str, torch.Tensor]:
    """What other programs load."""
    assert call("export", run, "--output", folder).code == 0
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def assert_goes_on(first: str, then: str, config: Path, folder: Path) -> None:
    """Killed inside of the second stage, it learns what a run learns that one process makes without a stop.

    Args:
        first: `parts` or `alone`: how it begins.
        then: How it goes on.
        config: Of the stream.
        folder: For the runs.
    """
    run, whole = folder / "run", folder / "whole"
    process = _started(first, config, run)
    wait_for(run / "stages" / "2-b" / "checkpoint.safetensors", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (run / "results.json").exists()
    resumed = _started(then, config, run)
    _, told = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, told
    assert "warn" not in told.lower()
    assert call("fit", "--config", config, "--run_dir", whole, "--trainer.max_steps=60").code == 0
    assert max(apart(whole, run).values()) <= SINGLE
    stages = [read_json(run / "stages" / name / "stage.json") for name in ("1-a", "2-b")]
    assert ["frozen_bytes" in stage for stage in stages] == [how == "parts" for how in (first, then)]
    found, expected = _exported(run, folder / "one"), _exported(whole, folder / "other")
    assert {*found} == {*expected}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=SINGLE, atol=SINGLE)
