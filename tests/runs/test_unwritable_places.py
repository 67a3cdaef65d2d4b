"""What is finished and lies where nothing can be written is used as far as nothing has to be written; the rest is told.

Folders without write permission, or of another user. Root would be let through: the commands run without that right.
"""

from __future__ import annotations

import os
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


PLACES = [
    no_write_permission,
    pytest.param(of_another_user, marks=pytest.mark.slow),
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


def is_told(text: str) -> bool:
    """Whether a mistake was told as got, why and fix."""
    return "residency: " in text and "  why: " in text and "  fix: " in text


def listing(folder: Path) -> dict[str, bytes | None]:
    """What everything below a folder holds; not when it was used last, which its owner may always set."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
