"""Whatever happens to a file of a run folder is seen when the folder is used again, and made again or told."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from residency.adapters.peft import lora
from residency.core.tensor_files import load_tree
from residency.mitigations import Replay
from residency.runs.store.store import Store
from residency.runs.views.trackers import Tracker
from residency.testing.tiny_runs import train
from support import wandb_logs
from support.cli import call, read_json, tiny_config, write_yaml

KINDS = {"a": "generative", "b": "label"}


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of two stages."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    again(folder, llama)
    return folder


def again(folder: Path, backbone: Path, **options: Any) -> dict[str, Any]:
    adapter = lora(r=2, target_modules="all-linear")
    record, _ = train(folder, backbone, adapter, {"replay": Replay()}, steps=2, every=1, kinds=KINDS, **options)
    return record


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 1
    write(path, bytes(data))


def write(path: Path, content: bytes) -> None:
    path.unlink()  # a copy may share its bytes with the original
    path.write_bytes(content)


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flip": flip,
    "empty": lambda path: write(path, b""),
    "cut": lambda path: write(path, path.read_bytes()[: path.stat().st_size // 2]),
    "replaced": lambda path: write(path, b'{"stage": 1}\n'),
    "dangling": dangle,
    "gone": Path.unlink,
}
FILES = ["results.json", "history.jsonl"]
FILES += [f"stages/1-a/{name}" for name in ("stage.json", "scores.parquet", "state.safetensors", "history.jsonl")]
# Every file once in `make test`, with the damage that is hardest to see; each with each in `make test-slow`.
CASES = [
    pytest.param(file, damage, marks=() if damage == "flip" else pytest.mark.slow)
    for file in FILES
    for damage in DAMAGE
]


@pytest.mark.parametrize(("file", "damage"), CASES)
def test_damage_is_made_again(file: str, damage: str, whole: Path, llama: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    DAMAGE[damage](run / file)
    again(run, llama)
    assert_equal_runs(whole, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again(run, llama)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}, "nothing is left to do"


def assert_equal_runs(one: Path, other: Path) -> None:
    """Scores, weights, states and history are bit-equal."""
    records = [read_json(run / "results.json") for run in (one, other)]
    assert records[0]["scores"] == records[1]["scores"]
    assert histories(one) == histories(other)
    for stage in sorted(path.name for path in (one / "stages").iterdir()):
        scores = [pl.read_parquet(run / "stages" / stage / "scores.parquet") for run in (one, other)]
        assert scores[0].equals(scores[1]), stage
        if stage != "0-base":
            states = [load_tree(run / "stages" / stage / "state.safetensors") for run in (one, other)]
            assert states[0]["weights"].keys() == states[1]["weights"].keys()
            assert all(torch.equal(states[1]["weights"][name], t) for name, t in states[0]["weights"].items()), stage


def histories(run: Path) -> list[dict[str, Any]]:
    files = [run / "history.jsonl", *sorted(run.glob("stages/*/history.jsonl"))]
    lines = [json.loads(text) for file in files for text in file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "time")} for line in lines]


def test_a_damaged_checkpoint_is_not_gone_on_from(whole: Path, llama: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        again(run, llama, callbacks=[_stop_in_second_stage()])
    checkpoint = run / "stages" / "2-b" / "checkpoint.safetensors"
    flip(checkpoint)
    again(run, llama)
    assert_equal_runs(whole, run)


def _stop_in_second_stage() -> Any:
    from lightning.pytorch import Callback

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if (module.stage.index, trainer.global_step) == (1, 1):
                raise ZeroDivisionError

    return Stop()


@pytest.fixture(scope="module")
def command(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(config, run folder) of a complete run of one step by the command line."""
    folder = tmp_path_factory.mktemp("command")
    config = tiny_config(folder, llama)
    config["trainer"]["max_steps"] = 1
    file = write_yaml(folder / "config-of-mine.yaml", config)
    assert call("fit", "--config", file, "--run_dir", folder / "run").code == 0
    return file, folder / "run"


def test_a_damaged_checkpoint_in_a_store_is_not_gone_on_from(
    command: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["fit", "--config", command[0], "--checkpoint_every_n_steps=1", "--trainer.max_steps=2"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert call(*words, "--run_dir", whole, "--store", tmp_path / "store-whole").code == 0
    words += ["--run_dir", run, "--store", tmp_path / "store"]
    put = Store.put

    def stop(store: Store, kind: Any, *rest: Any, **options: Any) -> Any:
        if kind == "trained":
            raise ZeroDivisionError
        return put(store, kind, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "put", stop)
        with pytest.raises(ZeroDivisionError):
            call(*words)
    (checkpoint,) = (tmp_path / "store" / "work").glob("*/checkpoint.safetensors")
    flip(checkpoint)
    result = call(*words)
    assert result.code == 0, result.err
    assert_equal_runs(whole, run)


@pytest.mark.parametrize("content", ["", "[" * 200, "\x00", "name: x", "- a"])
def test_a_damaged_config_is_written_again_or_told(content: str, command: tuple[Path, Path], tmp_path: Path) -> None:
    file, whole = command
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    good = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(content)
    result = call("fit", "--config", file, "--run_dir", run)
    if content == "name: x":
        assert result.code == 2
        assert "another config" in result.err
    else:
        assert result.code == 0, result.err
        assert "config.yaml" in result.err
        assert (run / "config.yaml").read_text() == good


def test_a_config_that_was_lost_is_not_replaced_by_another_one(command: tuple[Path, Path], tmp_path: Path) -> None:
    file, whole = command
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "config.yaml").write_text("")
    result = call("fit", "--config", file, "--run_dir", run, "--seed_everything=7")
    assert result.code == 2
    assert "another config" in result.err


@pytest.mark.parametrize("file", ["results.json", "config.yaml", "history.jsonl", "stages/1-a/scores.parquet"])
def test_a_folder_in_place_of_a_file_is_told(file: str, command: tuple[Path, Path], tmp_path: Path) -> None:
    config, whole = command
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / file).unlink()
    (run / file).mkdir()
    (run / file / "mine").write_text("mine")
    result = call("fit", "--config", config, "--run_dir", run)
    assert result.code == 2, result.err
    assert (run / file / "mine").read_text() == "mine"


def test_views_are_made_again_when_missing(command: tuple[Path, Path], tmp_path: Path) -> None:
    config, whole = command
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    # Killed after results.json: nothing of what views leave behind is there.
    for name in ("nll.png", "nll.svg", "views.json"):
        (run / name).unlink()
    results = (run / "results.json").read_bytes()
    result = call("fit", "--config", config, "--run_dir", run)
    assert result.code == 0
    assert "complete" in result.out
    assert (run / "nll.svg").is_file()
    for name in ("nll.png", "views.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert (run / "results.json").read_bytes() == results


@pytest.mark.slow
def test_what_wandb_was_not_told_is_told_by_the_same_command(
    command: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ended after results.json, before the summary: it is there once, and the run has ended well."""
    wandb_logs.temporary_home(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["fit", "--config", command[0], "--run_dir", tmp_path / "run"]

    def die(tracker: Tracker, record: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            call(*words)
    assert read_json(tmp_path / "run" / "results.json")["status"] == "done"
    for _ in range(2):
        assert call(*words).code == 0
    (fragments,) = wandb_logs.runs(tmp_path / "run").values()
    told = [fragment for fragment in fragments if "final/nll/average" in fragment.summary]
    assert len(told) == 1
    assert fragments[-1].exit_code == 0
    assert (tmp_path / "run" / "nll.svg").is_file()


def test_a_finished_run_needs_nothing_to_be_written(command: tuple[Path, Path], tmp_path: Path) -> None:
    config, whole = command
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / ".lock").unlink(missing_ok=True)
    times = {path: os.stat(path).st_mtime_ns for path in (run, *run.rglob("*"))}
    assert call("fit", "--config", config, "--run_dir", run).code == 0
    assert times == {path: os.stat(path).st_mtime_ns for path in (run, *run.rglob("*"))}
