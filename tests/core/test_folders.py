"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from residency.core.errors import UserError
from residency.core.folders import replace_folder


def fill(path: Path, content: str, *, overwrite: bool = False, fail: bool = False) -> None:
    with replace_folder(path, overwrite=overwrite, marker="mark") as folder:
        assert folder.parent == path.resolve().parent
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(content)
        if fail:
            raise RuntimeError("in the middle")
        (folder / "mark").write_text("")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fill(tmp_path / "out", "1", fail=True)
    assert names(tmp_path) == []
    fill(tmp_path / "deeper" / "out", "1")
    assert names(tmp_path / "deeper" / "out") == ["mark", "sub"]


def test_an_old_folder_survives_a_failure(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "1")
    with pytest.raises(UserError, match=r"holds an earlier export.*\n.*\n.*--overwrite"):
        fill(out, "2")
    with pytest.raises(RuntimeError):
        fill(out, "2", overwrite=True, fail=True)
    assert (out / "sub" / "file").read_text() == "1"
    fill(out, "2", overwrite=True)
    assert (out / "sub" / "file").read_text() == "2"
    assert names(tmp_path) == ["out"]


def test_only_what_was_written_here_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", "1")
    for foreign in ("folder", "file"):
        path = tmp_path / foreign
        (path / "precious").mkdir(parents=True) if foreign == "folder" else path.write_text("precious")
        with pytest.raises(UserError, match="no export of residency"):
            fill(path, "1", overwrite=True)
        assert path.exists()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    fill(tmp_path / "link", "2", overwrite=True)
    assert (tmp_path / "empty" / "sub" / "file").read_text() == "2"
    with pytest.raises(UserError, match="cannot be made"):
        fill(tmp_path / "file" / "out", "1")


def test_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    for name in (".out.999999999.partial", ".out.999999999.old", f".out.{os.getppid()}.partial", ".other.9.partial"):
        (tmp_path / name).mkdir()
    fill(tmp_path / "out", "1")
    assert names(tmp_path) == [".other.9.partial", f".out.{os.getppid()}.partial", "out"]
