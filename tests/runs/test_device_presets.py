"""Presets for GPUs, as far as a CPU can tell: they are read, and what they set beside the device trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from residency.core.errors import EXIT_USER
from support.cli import call, printed_config, tiny_config, write_yaml


@pytest.mark.parametrize(
    ("preset", "precision", "dtype"),
    [("gpu", "bf16-mixed", "float32"), ("gpu_bf16", "bf16-mixed", "bfloat16"), ("gpu_qlora", "bf16-mixed", "float32")],
)
def test_a_stream_on_a_cpu_with_all_but_the_gpu(
    preset: str, precision: str, dtype: str, llama: Path, tmp_path: Path
) -> None:
    config = write_yaml(tmp_path / "tiny.yaml", tiny_config(tmp_path / "data", llama))
    words = ["fit", "--config", config, "--config", preset, "--run_dir", tmp_path / "run", "--trainer.accelerator=cpu"]
    words += [f"--model.backbone.init_args.path={llama}", "--trainer.max_steps=2"]
    found = printed_config(*words)
    assert found["trainer"]["precision"] == precision
    assert found["model"]["backbone"]["init_args"]["dtype"] == dtype
    assert (found["model"]["backbone"]["init_args"]["quantisation"] is not None) == (preset == "gpu_qlora")
    result = call(*words)
    assert result.code == 0, result.err
    assert (tmp_path / "run" / "results.json").is_file()


def test_tf32_is_told_and_changes_the_key_only_where_it_is_on(llama: Path) -> None:
    from residency.backbones import CausalLM

    plain, fast = CausalLM(path=str(llama)).fingerprint(), CausalLM(path=str(llama), tf32=True).fingerprint()
    assert fast == {**plain, "tf32": "true"}


def test_a_base_in_parts_asks_for_two_processes(llama: Path, tmp_path: Path) -> None:
    """`tests/runs/test_sharded.py` starts them."""
    config = write_yaml(tmp_path / "tiny.yaml", tiny_config(tmp_path / "data", llama))
    words = ["fit", "--config", config, "--config", "fsdp", "--run_dir", tmp_path / "run"]
    found = printed_config(*words)["trainer"]
    assert found["devices"] == 2
    assert found["strategy"]["class_path"].endswith("ModelParallelStrategy")
    result = call(*words)
    assert result.code == EXIT_USER, result.err
    assert "torchrun" in result.err
