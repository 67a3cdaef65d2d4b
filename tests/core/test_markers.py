"""A folder is written into only if it is new, empty, or says that residency made it."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from residency.core import markers
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


@pytest.mark.parametrize("moment", ["marked", "written in"])
def test_a_folder_that_others_claim_meanwhile_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def marked_by_another(path: Path, kind: FolderKind) -> bool:
        # The answer of the moment before another process claims the folder.
        monkeypatch.undo()
        assert claim(path, kind)
        if moment == "written in":
            (path / "data").mkdir()
        return False

    monkeypatch.setattr(markers, "is_marked", marked_by_another)
    assert not claim(tmp_path / "new", RUN)
    assert is_marked(tmp_path / "new", RUN)


def test_many_claim_one_folder_at_once(tmp_path: Path) -> None:
    errors: list[BaseException] = []
    start = threading.Barrier(8)

    def work() -> None:
        for n in range(40):
            start.wait()
            try:
                claim(tmp_path / f"{n}", RUN)
                (tmp_path / f"{n}" / "data").mkdir(exist_ok=True)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == ["data", "run.json"]


def test_a_marker_cut_by_a_kill_leaves_a_folder_that_can_be_claimed(tmp_path: Path) -> None:
    (tmp_path / ".run.json.0123.tmp").write_text('{"resid')
    assert claim(tmp_path, RUN)
