"""A folder is written into only if it is new, empty, or says that residency made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from residency.core.errors import UserError
from residency.core.markers import FolderKind, claim, is_marked, owns

RUN = FolderKind(name="run", option="--run_dir", proof=lambda path: (path / "old-run").is_file())


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_a_new_and_an_empty_place_are_taken_once(tmp_path: Path) -> None:
    for place in (tmp_path / "deep" / "new", tmp_path):
        if place == tmp_path:
            (tmp_path / "deep" / "new" / "run.json").unlink()
            (tmp_path / "deep" / "new").rmdir()
            (tmp_path / "deep").rmdir()
        assert claim(place, RUN)
        assert not claim(place, RUN)
        assert is_marked(place, RUN)
        assert owns(place, RUN)


@pytest.mark.parametrize("marker", [None, "", "{}", "[" * 5000, json.dumps({"residency": "study"}), "\0", "null"])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, marker: str | None) -> None:
    (tmp_path / ".bashrc").write_text("mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.csv").write_text("1")
    if marker is not None:
        (tmp_path / "run.json").write_text(marker)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"(?s)\.bashrc, data.*--run_dir") as refused:
        claim(tmp_path, RUN)
    assert "--overwrite" in refused.value.fix
    assert tree(tmp_path) == before
    assert not owns(tmp_path, RUN)
    assert not claim(tmp_path, RUN, overwrite=True)
    assert (tmp_path / "data" / "rows.csv").read_text() == "1"
    assert owns(tmp_path, RUN)


def test_a_folder_of_an_earlier_version_is_known_by_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "old-run").touch()
    assert owns(tmp_path, RUN)
    assert not is_marked(tmp_path, RUN)
    assert not claim(tmp_path, RUN)
    assert is_marked(tmp_path, RUN)


def test_a_lock_alone_is_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    assert claim(tmp_path, RUN)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        claim(tmp_path / "x", RUN)
