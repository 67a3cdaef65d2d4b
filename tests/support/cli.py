"""Call `residency` in this process, on a tiny stream."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from residency.__main__ import main
from residency.testing.tiny_models import write_domain

__all__ = ["Result", "call", "printed_config", "read_json", "tiny_config", "write_yaml"]


@dataclass(frozen=True)
class Result:
    """What a command left behind: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def call(*words: object) -> Result:
    """Run one command."""
    argv = [str(word) for word in words]
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", ["residency", *argv]), redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as stop:  # --help and --print_config end the process, as argparse does
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def tiny_config(folder: Path, backbone: Path) -> dict[str, Any]:
    """A stream of two tiny domains, text and labels, three steps each."""
    kinds = {"a": "generative", "b": "label"}
    lora = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "target_modules": "all-linear"}}
    return {
        "name": "tiny",
        "model": {
            "backbone": {"class_path": "residency.backbones.CausalLM", "init_args": {"path": str(backbone)}},
            "adapter": {"class_path": "residency.adapters.Peft", "init_args": {"config": lora}},
            "objective": {"class_path": "residency.objectives.SFT"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
        },
        "data": {
            "domains": {name: write_domain(folder, name, kind=kind) for name, kind in kinds.items()},
            "batch_size": 4,
        },
        "trainer": {"max_steps": 3, "accelerator": "cpu"},
    }


def write_yaml(path: Path, content: Any) -> Path:
    """Write a YAML file; its path."""
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def printed_config(*words: object) -> dict[str, Any]:
    """What `--print_config` shows."""
    result = call(*words, "--print_config")
    assert result.code == 0, result.err
    config: dict[str, Any] = yaml.safe_load(result.out)
    return config
