"""Offline W&B runs are found, each once, and handed to W&B's own command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from residency.runs.views import sync_command
from support.cli import call


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study with two offline runs, one that was uploaded, one without a log, and a report's."""
    folder = tmp_path / "study"
    for place in ("cells/a/wandb/offline-run-2", "cells/b/wandb/offline-run-1", "report/wandb/offline-run-3"):
        (folder / place).mkdir(parents=True)
        (folder / place / "run-x.wandb").touch()
    uploaded = folder / "cells" / "b" / "wandb" / "offline-run-0"
    uploaded.mkdir()
    (uploaded / "run-y.wandb").touch()
    (uploaded / "run-y.wandb.synced").touch()
    (folder / "cells" / "a" / "wandb" / "offline-run-9").mkdir()
    (folder / "cells" / "a" / "wandb" / "run-online-1").mkdir()
    return folder


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have been run."""
    found: list[list[str]] = []

    def keep(words: list[str], **_: Any) -> int:
        found.append(words)
        return 0

    monkeypatch.setattr(sync_command.subprocess, "call", keep)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    return found


def test_each_run_goes_up_once_the_oldest_first(study: Path, called: list[list[str]]) -> None:
    result = call("sync", study, "--project", "p", "--entity", "e")
    assert result.code == 0
    (words,) = called
    assert words[:5] == [sys.executable, "-m", "wandb", "sync", "--yes"]
    assert words[5:9] == ["--project", "p", "--entity", "e"]
    assert [Path(word).name for word in words[9:]] == ["offline-run-1", "offline-run-2", "offline-run-3"]


def test_a_dry_run_lists(study: Path, called: list[list[str]]) -> None:
    result = call("sync", "--dry-run", study, study / "cells" / "a")
    assert (result.code, called) == (0, [])
    assert "3 offline runs to upload" in result.out


def test_a_folder_of_wandb_counts_too(
    study: Path, called: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "else" / "wandb" / "offline-run-8").mkdir(parents=True)
    (tmp_path / "else" / "wandb" / "offline-run-8" / "run.wandb").touch()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "else"))
    assert "4 offline runs to upload" in call("sync", "--dry-run", study).out


def test_mistakes_and_failures(tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("sync", tmp_path / "no").code == 2
    monkeypatch.setattr(sync_command.subprocess, "call", lambda words, **_: 1)
    assert call("sync", study).code == 3
