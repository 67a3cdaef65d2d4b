"""The command itself on several ranks: a session of processes that can be watched and killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support.cli import tiny_config, write_yaml

__all__ = ["command", "members", "start", "stream_config", "wait_for"]


def stream_config(folder: Path, backbone: Path, **model: Any) -> Path:
    """The tiny stream as a config file, with plain SGD and EWC; a checkpoint after every step.

    Args:
        folder: Where it is written.
        backbone: Its model.
        model: Other parts, by key.
    """
    content = tiny_config(folder / "data", backbone)
    ewc = {"class_path": "residency.mitigations.EWC", "init_args": {"strength": 10.0}}
    content["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    content["model"] |= {"mitigations": {"ewc": ewc}, **model}
    return write_yaml(folder / "tiny.yaml", {**content, "checkpoint_every_n_steps": 1})


def command(config: Path, run: Path, ranks: int, *more: str) -> list[str]:
    words = ["fit", "--config", str(config), "--run_dir", str(run), f"--trainer.devices={ranks}", *more]
    return [sys.executable, "-m", "residency", *words]


def start(words: list[str], **environment: str) -> subprocess.Popen[str]:
    known = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, text=True, env=known, start_new_session=True, **pipes)  # type: ignore[call-overload,no-any-return]


def members(process: subprocess.Popen[str]) -> list[int]:
    """Processes of the session that a command began."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == process.pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.05)
