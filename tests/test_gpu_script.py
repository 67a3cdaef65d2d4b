"""The script for a GPU runs, on a CPU with tiny models; what it says of a GPU nobody can test here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "experiments/gpu/measure.py"


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    words = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(out)]
    known = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=known)
    assert done.returncode == 0, done.stderr
    lines = json.loads(out.read_text(encoding="utf-8"))
    assert [line for line in lines if line.get("failed")] == []
    assert {line["part"] for line in lines} == {"facts", "kernels", "model", "speed"}
    kernels = [line["error"] for line in lines if line["part"] == "kernels"]
    assert len(kernels) == 6
    assert max(kernels) <= 1e-5
    speeds = {line["what"]: line for line in lines if line["part"] == "speed"}
    assert speeds["residency, LoRA r 16"]["tokens_per_second"] > 0
    assert speeds["residency, full"]["estimated_gib"] > 0
    assert "| kernels | flex float32, window 50, heads 6/2 | error" in done.stdout
