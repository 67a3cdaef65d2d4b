"""The Slurm recipe calls what Ray and our command line understand (recorded argv: `srun` and `scontrol` are stubs)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[3] / "experiments" / "slurm" / "ray.sbatch"
ALLOCATION = {
    "SLURM_JOB_NODELIST": "node[1-3]",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_CPUS_PER_TASK": "16",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_JOB_ID": "77",
}


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """What `srun` is given, and its environment."""
    record = f'printf "%s\\n" "$@" > {tmp_path}/argv; env -0 > {tmp_path}/environment\n'
    for name, body in (("srun", record), ("scontrol", 'printf "node1\\nnode2\\nnode3\\n"\n')):
        stub = tmp_path / name
        stub.write_text(f"#!/bin/sh\n{body}")
        stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **ALLOCATION}
    subprocess.run(["bash", str(RECIPE), "study file.yaml", "--threads", "4"], env=environment, check=True)
    pairs = (pair.partition("=") for pair in (tmp_path / "environment").read_text().split("\0") if pair)
    return (tmp_path / "argv").read_text().splitlines(), {name: value for name, _, value in pairs}


def test_ray_understands_what_it_is_given(recorded: tuple[list[str], dict[str, str]]) -> None:
    pytest.importorskip("ray", reason="the extra residency[ray] is not installed")
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

    argv = recorded[0]
    assert argv[:4] == ["--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "ray"]
    assert argv[4] == "symmetric-run"
    ours = argv[5 : argv.index("--")]
    known = symmetric_run.make_context("_", list(ours), resilient_parsing=True).params
    assert (known["address"], known["min_nodes"]) == ("node1:6379", 3)
    options = start.make_context("ray start", ["--head", *curate_and_validate_ray_start_args(list(ours))]).params
    assert (options["num_cpus"], options["num_gpus"], options["temp_dir"]) == (16, 4, "/tmp/ray-77")
    assert options["include_dashboard"] is False


def test_the_study_is_swept_on_that_cluster(recorded: tuple[list[str], dict[str, str]]) -> None:
    argv, environment = recorded
    command = argv[argv.index("--") + 1 :]
    assert command[:2] == ["env", "RAY_ADDRESS=node1:6379"]
    assert command[2:] == ["residency", "sweep", "--executor", "ray", "study file.yaml", "--threads", "4"]
    assert len(environment["RAY_AUTH_TOKEN"]) == 64
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
