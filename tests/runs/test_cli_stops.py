"""What stops a run from outside: another process, another config, a full disk, a signal; and a real, quiet process."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from residency.core import tensor_files as storage
from residency.engine.checkpointing import History
from support.cli import call, read_json, tiny_config, write_yaml

LOCK = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


@pytest.fixture(scope="module")
def config(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny stream as a config file."""
    folder = tmp_path_factory.mktemp("config")
    return write_yaml(folder / "tiny.yaml", tiny_config(folder / "data", llama))


@pytest.fixture(scope="module")
def fitted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made by a process of its own."""
    run = tmp_path_factory.mktemp("runs") / "run"
    words = [sys.executable, "-m", "residency", "fit", "--config", str(config), "--run_dir", str(run)]
    # Bit-equal scores need as many threads as this process has.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, env=environment)
    (run / "streams.txt").write_text(f"{done.returncode}\0{done.stdout}\0{done.stderr}")
    return run


def test_a_process_prints_nothing_that_is_not_ours(fitted: Path) -> None:
    code, out, err = (fitted / "streams.txt").read_text().split("\0")
    assert code == "0", err
    progress = r"(scoring (before training|after [ab]): |tiny  [12]/2  [ab]: )\d+.*"
    assert [line for line in err.splitlines() if not re.fullmatch(progress, line)] == []
    assert len(err.splitlines()) == 10, "a first and a last line of three evaluations and two stages"
    assert "Warning" not in out, "Python's are ours to prevent; what the data are short of is told in words"


def test_two_processes_agree(fitted: Path, config: Path, tmp_path: Path) -> None:
    assert call("fit", "--config", config, "--run_dir", tmp_path / "run").code == 0
    assert read_json(tmp_path / "run" / "results.json")["scores"] == read_json(fitted / "results.json")["scores"]


def test_a_stage_that_is_not_there(fitted: Path, tmp_path: Path) -> None:
    for verb in ("test", "validate", "predict"):
        result = call(verb, fitted, "--stage", 9)
        assert (result.code, result.out) == (2, "")
        assert "stage 9" in result.err
        assert "[1, 2]" in result.err
    result = call("test", tmp_path)
    assert result.code == 2
    assert f"no {tmp_path / 'config.yaml'}" in result.err
    assert not list(fitted.glob("scores-*"))


def test_a_domain_that_is_not_there(fitted: Path) -> None:
    result = call("predict", fitted, "--domain", "z")
    assert result.code == 2
    assert "--domain 'z'" in result.err
    assert "a, b" in result.err


def test_a_folder_with_another_config(fitted: Path, config: Path) -> None:
    before = (fitted / "config.yaml").read_bytes()
    result = call("fit", "--config", config, "--run_dir", fitted, "--model.optimizer.lr=1", "--seed_everything=3")
    assert (result.code, result.out) == (2, "")
    assert "model.optimizer.init_args.lr, seed_everything" in result.err
    assert result.err.count("  fix: ") == 1
    assert (fitted / "config.yaml").read_bytes() == before


def test_a_mistake_that_is_corrected_may_use_the_same_folder(config: Path, tmp_path: Path) -> None:
    words = ["fit", "--config", config, "--run_dir", tmp_path / "run", "--trainer.max_steps=1"]
    assert call(*words, "--model.adapter.config.target_modules=[nope]").code == 2
    assert call(*words).code == 0


def test_a_folder_in_use(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    words = [sys.executable, "-c", LOCK, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        result = call("fit", "--config", config, "--run_dir", tmp_path / "run")
        holder.communicate("\n")
    assert (result.code, result.out) == (2, "")
    assert "in use by another process" in result.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_made(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    file = tmp_path / "file"
    for folder, told in ((file, f"{file} is a file"), (file / "run", f"{file / 'run'} cannot be made")):
        result = call("fit", "--config", config, "--run_dir", folder)
        assert (result.code, result.out) == (2, "")
        assert told in result.err
        assert "--run_dir" in result.err
        assert file.read_text() == ""


def test_a_full_disk(config: Path, tmp_path: Path, fitted: Path) -> None:
    run = tmp_path / "run"
    words = ["fit", "--config", config, "--run_dir", run]

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half a stage")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "save_file", full)
        result = call(*words)
    assert result.code == 2
    message = result.err[result.err.index("residency: ") :]
    assert re.fullmatch(r"residency: no room on the disk[^\n]*\n  why: [^\n]+\n  fix: [^\n]+\n", message)
    assert "Traceback" not in result.err
    assert [path.name for path in (run / "stages" / "1-a").iterdir()] == []
    assert not (run / "results.json").exists()
    assert not list(run.rglob("*.tmp"))
    assert call(*words).code == 0
    assert read_json(run / "results.json")["scores"] == read_json(fitted / "results.json")["scores"]


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT is heard, as where somebody sits before a terminal: what a script starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal(number: signal.Signals, config: Path, tmp_path: Path, fitted: Path) -> None:
    run = tmp_path / "run"
    words = ["fit", "--config", config, "--run_dir", run]
    original = History.on_train_batch_end

    def stop(self: History, *args: Any) -> None:
        original(self, *args)
        if self.stage.index == 1:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(History, "on_train_batch_end", stop)
        result = call(*words)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert result.code == 75
    lines = result.err.splitlines()
    assert lines[-1] == f"residency: stopped by {number.name}; what is complete is kept, the same command goes on"
    assert "Traceback" not in result.err
    assert "stopped" not in result.out
    assert (run / "stages" / "1-a" / "stage.json").exists()
    assert not (run / "results.json").exists()
    assert not list(run.rglob("*.tmp"))
    again = call(*words)
    assert again.code == 0
    assert "going on after stage 1 of 2" in again.out
    assert read_json(run / "results.json")["scores"] == read_json(fitted / "results.json")["scores"]
