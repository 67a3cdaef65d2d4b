"""The packaged model on packaged domains through the command line, killed in mid-stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from residency.core.assets.cache import cache_folder

ROOT = Path(__file__).parents[2]
MODEL = cache_folder() / "models" / "smollm2-135m-instruct"

WORDS = [
    *("--config", str(ROOT / "configs" / "quickstart.yaml"), "--trainer.max_steps=3", "--data.batch_size=2"),
    *("--data.order=[medical, code]", "--checkpoint_every_n_steps=1"),
    *("--model.mitigations.ewc", str(ROOT / "configs" / "mitigation" / "ewc.yaml")),
    *("--model.mitigations.ewc.fisher_samples=2",),
    *("--model.mitigations.replay", str(ROOT / "configs" / "mitigation" / "replay.yaml")),
    *("--model.mitigations.mixing", str(ROOT / "configs" / "mitigation" / "weight_mixing.yaml")),
    *(f"--data.domains.{name}.max_test=2" for name in ("medical", "code")),
    *(f"--data.domains.{name}.scorers=[nll]" for name in ("medical", "code")),
]


def start(run: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "residency", "fit", *WORDS, "--run_dir", str(run)]
    return subprocess.Popen(words, env={**os.environ, "WANDB_MODE": "disabled"}, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="the packaged model is absent: run `residency assets`")
def test_real_model_killed_in_mid_stage(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(timeout=600) == 0
    process = start(killed)
    history = killed / "history.jsonl"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if history.is_file() and len(history.read_text().splitlines()) >= 5:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.05)
    assert process.wait() == -signal.SIGKILL
    assert (killed / "stages" / "1-medical" / "stage.json").is_file()
    assert not (killed / "results.json").exists()
    assert start(killed).wait(timeout=600) == 0
    records = [json.loads((run / "results.json").read_text()) for run in (whole, killed)]
    assert records[0]["scores"] == records[1]["scores"]
    matrix = records[0]["scores"]["nll"]["R"]
    assert matrix[1][0] < matrix[0][0], "medicine is learned"
