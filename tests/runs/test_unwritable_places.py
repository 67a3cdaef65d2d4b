"""What is finished and lies where nothing can be written is used as far as nothing has to be written; the rest is told.

Folders of another user, without write permission, or on a read-only file system; and single files with mode 000.
Root would be let through: the commands run without that right.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from residency.core.yaml_files import read_yaml
from support.cli import call, tiny_config, write_yaml
from support.forked_commands import start
from support.tiny_sweeps import write_study

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="modes and mounts as Linux has them"),
    pytest.mark.timeout(3600),
]
NOBODY = 65534


@dataclass(frozen=True)
class Finished:
    """A run and a study that are complete, and the files that made them."""

    home: Path
    config: Path
    study_file: Path

    @property
    def run(self) -> Path:
        return self.home / "run"

    @property
    def study(self) -> Path:
        return self.home / "study"

    @property
    def larger(self) -> Path:
        """The study's file with one more seed."""
        return self.study_file.with_name("larger.yaml")


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("unwritable")
    content = tiny_config(root / "data", llama)
    content["trainer"]["max_steps"] = 1
    config = write_yaml(root / "config.yaml", content)
    (root / "home").mkdir()
    made = Finished(home=root / "home", config=config, study_file=root / "s" / "study.yaml")
    assert call("fit", "--config", config, "--run_dir", made.run).code == 0
    (root / "s").mkdir()
    write_study(root / "s", llama, steps=1, domains="ab", axes={"mitigation": {"none": {}}}, seeds=[0])
    write_yaml(made.larger, {**read_yaml(made.study_file, what="the study"), "seeds": [0, 1]})
    for _ in range(2):
        words = ("sweep", made.study_file, "--study_dir", made.study, "--workers", 1, "--threads", 1)
        assert run(words, root, log=root / "made.txt") == 0, (root / "made.txt").read_text()
    return made


def run(words: Sequence[object], place: Path, *, log: Path) -> int:
    """The exit code of a command that stands in `place` and may do what modes say."""
    process = start(words, cwd=place, log=log, obey_modes=True)
    process.join(600)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode


@contextmanager
def no_write_permission(home: Path) -> Iterator[None]:
    paths = [home, *home.rglob("*")]
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        yield
    finally:
        for path in paths:
            path.chmod(path.stat().st_mode | 0o200)


@contextmanager
def of_another_user(home: Path) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    paths = [home, *home.rglob("*")]
    for path in paths:
        os.chown(path, NOBODY, NOBODY)
    try:
        yield
    finally:
        for path in paths:
            os.chown(path, 0, 0)


@contextmanager
def on_read_only_file_system(home: Path) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    bound = subprocess.run(["mount", "--bind", home, home], capture_output=True, text=True, check=False)
    if bound.returncode:
        pytest.skip(f"cannot mount: {bound.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", home], check=True)
        yield
    finally:
        subprocess.run(["umount", home], check=True)


PLACES = [
    no_write_permission,
    pytest.param(of_another_user, marks=pytest.mark.slow),
    pytest.param(on_read_only_file_system, marks=pytest.mark.slow),
]


def commands(made: Finished, elsewhere: Path) -> dict[str, tuple[int, list[object]]]:
    """{name: (exit code, command)}: what has to write nothing there, then what has to."""
    sweep: list[object] = ["sweep", made.study_file, "--study_dir", made.study, "--workers", 1, "--threads", 1]
    return {
        "fit": (0, ["fit", "--config", made.config, "--run_dir", made.run]),
        "test": (0, ["test", made.run]),
        "predict": (0, ["predict", made.run, "--limit=1"]),
        "report": (0, ["report", made.study, "--output", elsewhere / "report"]),
        "sweep": (0, sweep),
        "dry run": (0, [*sweep, "--dry-run"]),
        "ls": (0, ["ls", made.home]),
        "verify": (0, ["store", "verify", made.study / "store"]),
        "export": (0, ["export", made.run, "--output", elsewhere / "export"]),
        "another config": (2, ["fit", "--config", made.config, "--run_dir", made.run, "--trainer.max_steps=2"]),
        "new run": (2, ["fit", "--config", made.config, "--run_dir", made.home / "new"]),
        "report beside": (2, ["report", made.run]),
        "another study": (2, ["sweep", made.larger, *sweep[2:]]),
    }


@pytest.mark.parametrize("place", PLACES)
def test_what_is_finished_needs_nothing_to_be_written(
    place: Callable[[Path], AbstractContextManager[None]], finished: Finished, tmp_path: Path
) -> None:
    with place(finished.home):
        before = listing(finished.home)
        for name, (code, words) in commands(finished, tmp_path).items():
            log = tmp_path / f"{name}.txt"
            ended, text = run(words, tmp_path, log=log), log.read_text()
            assert ended == code, (name, text)
            assert code == 0 or is_told(text), (name, text)
            assert "Traceback" not in text, (name, text)
        assert listing(finished.home) == before


# What each file is read by; `fit` and `sweep` may need no more than the digest of what is complete.
FILES = {
    "run": ["results.json", "config.yaml", "history.jsonl", "run.json", "stages/2-b/stage.json"],
    "study": ["plan.json", "finished.json", "cells/none-s0/results.json", "store/store.json"],
}
FILES["run"] += ["stages/2-b/state.safetensors", "stages/2-b/scores.parquet"]
FILES["study"] += ["cells/none-s0/stages/1-a/scores.parquet", "logs", "store", "cells/none-s0"]
CASES = [
    pytest.param(what, file, marks=() if (what, file) == ("run", "results.json") else pytest.mark.slow)
    for what, files in FILES.items()
    for file in files
]


@pytest.mark.parametrize(("what", "file"), CASES)
def test_what_cannot_be_read_is_told_and_left_as_it_is(
    what: str, file: str, finished: Finished, tmp_path: Path
) -> None:
    chosen = finished.home / what / file
    names = {"run": ["fit", "test", "report", "ls"], "study": ["sweep", "report", "verify", "ls"]}[what]
    lines = commands(finished, tmp_path)
    if what == "run":
        lines["report"] = (0, ["report", finished.run, "--output", tmp_path / "of the run"])
    before, mode = listing(finished.home), chosen.stat().st_mode
    chosen.chmod(0)
    codes = {}
    try:
        for name in names:
            log = tmp_path / f"{name}.txt"
            codes[name] = run(lines[name][1], tmp_path, log=log)
            text = log.read_text()
            assert "Traceback" not in text, (name, text)
            # What is not checked, or not shown, is named: `ls` and `verify` go on with what they can read.
            assert codes[name] in (0, 2, 3), (name, text)
            assert codes[name] != 2 or (is_told(text) and chosen.name in text), (name, text)
    finally:
        chosen.chmod(mode)
    # `test` leaves its scores beside what is there; a sweep that cannot see that it is finished draws its report anew.
    after = listing(finished.home)
    assert {name for name in before if after.get(name) != before[name]} <= {
        name for name in before if file == "finished.json" and name.startswith("study/report/")
    }
    if file.endswith("results.json"):
        # States are enough to score; what was scored is needed by the others.
        assert {name for name, code in codes.items() if code == 2} >= {"fit", "sweep", "report"} & codes.keys()


def is_told(text: str) -> bool:
    """Whether a mistake was told as got, why and fix."""
    return "residency: " in text and "  why: " in text and "  fix: " in text


def listing(folder: Path) -> dict[str, bytes | None]:
    """What everything below a folder holds; not when it was used last, which its owner may always set."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
