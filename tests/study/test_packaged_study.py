"""The engine on the packaged model and real domains: a cell is what `residency fit` gives for it alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from residency.core.assets.cache import packaged_model
from residency.core.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


def residency(*words: object, at: Path) -> str:
    """Run the command in a process of its own, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-m", "residency", *map(str, words)], cwd=at, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def short_study(folder: Path) -> Path:
    """The quickstart with two domains, two steps and few rows; without and with replay and EWC."""
    base = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    base["model"]["adapter"] = str(CONFIGS / "adapter" / "lora.yaml")
    domains = {name: base["data"]["domains"][name] for name in ("medical", "code")}
    for domain in domains.values():
        domain["init_args"]["max_test"] = 4
    base["data"]["domains"] = domains
    base["trainer"] |= {"max_steps": 2, "accelerator": "cpu"}
    base["evaluation"] = {"accuracy_rows": 2, "generation_rows": 2}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    protected = {
        "model.mitigations.replay": str(CONFIGS / "mitigation" / "replay.yaml"),
        "model.mitigations.ewc": str(CONFIGS / "mitigation" / "ewc.yaml"),
        "model.mitigations.ewc.fisher_samples": 4,
    }
    study = {"name": "short", "base": "base.yaml", "axes": {"mitigation": {"none": {}, "both": protected}}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder / "study.yaml"


@pytest.mark.slow
def test_two_cells_of_the_packaged_model_equal_their_runs_alone(tmp_path: Path) -> None:
    try:
        packaged_model()
    except UserError as error:
        pytest.skip(str(error))
    path = short_study(tmp_path)
    residency("sweep", path, "--study_dir", "out", "--workers", 2, "--threads", 1, at=tmp_path)
    for cell in ("none-s0", "both-s0"):
        folder = tmp_path / "out" / "cells" / cell
        residency("fit", "--config", folder / "config.yaml", "--run_dir", f"alone/{cell}", "--store=null", at=tmp_path)
        records: list[dict[str, Any]] = [
            json.loads((run / "results.json").read_text()) for run in (folder, tmp_path / "alone" / cell)
        ]
        assert records[0]["scores"] == records[1]["scores"], cell
        assert records[0]["scores"]["nll"]["R"][0] != records[0]["scores"]["nll"]["R"][2]
    assert (tmp_path / "out" / "report" / "index.html").is_file()
