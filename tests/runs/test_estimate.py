"""`residency fit --dry-run`: told before anything is loaded, written or launched."""

from __future__ import annotations

from pathlib import Path

import pytest

from residency.backbones import CausalLM
from residency.runs.estimate import energy_kwh
from support.cli import call, tiny_config, write_yaml


@pytest.fixture
def config(llama: Path, tmp_path: Path) -> Path:
    return write_yaml(tmp_path / "tiny.yaml", tiny_config(tmp_path / "data", llama))


def test_it_tells_and_does_nothing(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: CausalLM) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(CausalLM, "load", refuse)
    result = call("fit", "--config", config, "--run_dir", tmp_path / "run", "--dry-run", "--memory", "1")
    assert result.code == 0, result.err
    for part in ("weights", "gradients", "optimizer", "activations", "remembered by mitigations", "tokens", "FLOPs"):
        assert part in result.out
    assert "fits into 1.00 GiB: --data.micro_batch_size=4" in result.out
    assert "time: unknown; --measure tries a few steps" in result.out
    assert not (tmp_path / "run").exists()


def test_devices_share_the_batch_and_are_not_started(config: Path, tmp_path: Path) -> None:
    words = ["fit", "--config", config, "--run_dir", tmp_path / "run", "--dry-run", "--trainer.devices=2"]
    result = call(*words)
    assert result.code == 0, result.err
    assert "memory on each of 2 devices" in result.out
    assert "with micro-batches of 2" in result.out
    assert call(*words, "--memory", "0.0001").out.count("not even one example fits") == 1


def test_a_base_in_parts_is_counted_by_its_part(config: Path, tmp_path: Path) -> None:
    words = ["fit", "--config", config, "--config", "fsdp", "--run_dir", tmp_path / "run", "--dry-run"]
    result = call(*words)
    assert result.code == 0, result.err
    assert "  of frozen weights a device keeps 1/2;" in result.out
    result = call(*words, "--model.adapter=full")
    assert result.code == 0, result.err
    assert "  of weights, gradients and optimizer state a device keeps 1/2;" in result.out


def test_what_is_wrong_is_found(config: Path, tmp_path: Path) -> None:
    result = call("fit", "--config", config, "--dry-run", "--data.micro_batch_size=3")
    assert result.code == 2
    assert "multiple of devices x micro-batch" in result.err


def test_time_energy_and_money(config: Path, tmp_path: Path) -> None:
    prices = ["--measure", "--watts", "300", "--kwh-price", "0.3", "--hour-price", "2"]
    result = call("fit", "--config", config, "--run_dir", tmp_path / "run", "--dry-run", *prices)
    assert result.code == 0, result.err
    assert "time: about" in result.out
    assert "kWh at 300 W, 0.00 in money" in result.out
    assert "at 2 an hour" in result.out
    assert not (tmp_path / "run").exists()
    assert energy_kwh(3600, watts=500, devices=2) == 1.0
