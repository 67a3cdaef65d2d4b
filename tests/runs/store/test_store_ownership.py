"""The store's commands touch what the store's own naming proves to be its own, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from residency.core.errors import UserError
from residency.core.leases import lease, owner_is_dead
from residency.runs.store.store import Store
from support.cli import call


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's project whose folders are called as those of a store."""
    files = {
        "data/patients/rows.csv": "id,age\n1,40\n",
        "models/my-finetune/model.safetensors": "weights",
        "tmp/notes/thesis.txt": "a year of work",
        "trained/README": "mine",
        f"trained/{key('mine')}/entry.json": json.dumps({"meta": {}, "files": {}, "checksum": "0"}),
        "work/todo.txt": "mine",
        "leases/house.pdf": "mine",
        "aside/old": "mine",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
        os.utime(tmp_path / name, (0, 0))
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [("ls",), ("verify",), ("gc",), ("gc", "--max-size", "0", "--yes"), ("gc", "--unused", "0", "--yes")],
    ids=" ".join,
)
def test_a_folder_that_is_no_store_is_refused_untouched(project: Path, words: tuple[str, ...]) -> None:
    before = tree(project)
    result = call("store", words[0], project, *words[1:])
    assert result.code == 2, result.out
    assert "store.json" in result.err
    assert tree(project) == before


def test_a_store_is_not_begun_in_a_folder_of_something_else(project: Path) -> None:
    before = tree(project)
    for begin in (
        lambda store: store.put("trained", key("x"), lambda folder: None, meta={}),
        lambda store: store.lease("trained", key("x")).__enter__(),
    ):
        with pytest.raises(UserError, match="no store of residency"):
            begin(Store(project))
    assert tree(project) == before


def test_in_a_store_only_what_is_its_own_goes(project: Path) -> None:
    path = project / "store"
    store = Store(path)
    for name in ("a", "b"):
        store.put("trained", key(name), lambda folder: None, meta={})
    store.work(key("a")).mkdir(parents=True)
    mine = ["data/patients.csv", "tmp/notes.txt", "trained/notes", "work/plan.txt", "leases/x", "aside/y", "models/m/w"]
    for name in mine:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("mine")
        os.utime(path / name, (0, 0))
    (path / "aside" / "away").symlink_to(project / "data")
    assert call("store", "verify", path).code == 0
    assert call("store", "gc", path, "--max-size", "0", "--yes").code == 0
    assert all((path / name).read_text() == "mine" for name in mine)
    assert (path / "aside" / "away").is_symlink()
    assert not store.has("trained", key("a"))
    assert not store.work(key("a")).exists()
    assert (project / "data" / "patients" / "rows.csv").is_file()


@pytest.mark.parametrize("number", ["-1", "nan", "inf", "-inf"])
def test_senseless_days_are_refused(tmp_path: Path, number: str) -> None:
    Store(tmp_path).put("trained", key("a"), lambda folder: None, meta={})
    result = call("store", "gc", tmp_path, f"--unused={number}", "--yes")
    assert result.code == 2
    assert "days" in result.err
    assert Store(tmp_path).has("trained", key("a"))


def test_a_store_of_an_earlier_version_is_adopted_by_its_naming(tmp_path: Path) -> None:
    Store(tmp_path).put("trained", key("a"), lambda folder: None, meta={})
    (tmp_path / "store.json").unlink()
    assert call("store", "verify", tmp_path).code == 0
    Store(tmp_path).put("trained", key("b"), lambda folder: None, meta={})
    assert (tmp_path / "store.json").is_file()
    (tmp_path / "store.json").unlink()
    (tmp_path / "thesis.txt").write_text("mine")
    assert call("store", "gc", tmp_path).code == 2, "something that no store holds lies in it"


def test_bytes_that_runs_share_are_not_called_freed(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    entry = store.put("trained", key("a"), lambda folder: (folder / "x").write_bytes(bytes(2**20)) and None, meta={})
    os.link(entry.path / "x", tmp_path / "state")
    result = call("store", "gc", store.path, "--max-size", "0", "--yes")
    assert result.code == 0
    assert "trained: 1, 1.0 MiB" in result.out
    assert "0.0 MiB freed" in result.out
    assert (tmp_path / "state").stat().st_size == 2**20


def test_bytes_that_cannot_be_removed_are_not_called_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    entries = [
        store.put("trained", key(name), lambda folder: (folder / "x").write_bytes(bytes(2**20)) and None, meta={})
        for name in ("a", "b")
    ]
    real = os.rename

    def refuse(source: Path, target: Path) -> None:
        if source == entries[0].path:
            raise PermissionError(13, "Permission denied", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    result = call("store", "gc", store.path, "--max-size", "0", "--yes")
    assert result.code == 3
    assert f"not removed: {entries[0].path}: Permission denied" in result.out.replace("\n", "")
    assert "1.0 MiB freed" in result.out
    assert "1.0 MiB stay" in result.out
    assert [entry.path.exists() for entry in entries] == [True, False]


def test_what_cannot_be_read_is_left_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    entry = store.put("trained", key("a"), lambda folder: (folder / "x").write_bytes(b"1") and None, meta={})
    real = Path.open

    def refuse(path: Path, *args: object, **options: object) -> object:
        if path.name == "x":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    result = call("store", "verify", store.path)
    assert result.code == 3
    assert "not checked" in result.out
    assert entry.path.is_dir()
    with pytest.raises(UserError, match="Permission denied"):
        store.find("trained", key("a"))
    assert not (store.path / "aside").exists()


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def looping(path: Path) -> None:
    path.symlink_to(path.name)


def text(content: str) -> object:
    return lambda path: path.write_text(content)


@pytest.mark.parametrize(
    "make",
    [
        *(dangling, looping, Path.mkdir, os.mkfifo),
        *map(text, ("[1, 2]", "null", "[" * 5000, "\x00\xff", json.dumps({"place": 3, "pid": "x"}))),
    ],
)
def test_junk_in_place_of_a_lease_expires(tmp_path: Path, make: object) -> None:
    path = tmp_path / "x"
    make(path)  # type: ignore[operator]
    assert not owner_is_dead(path), "just made"
    os.utime(path, (time.time() - 3600,) * 2, follow_symlinks=False)
    with lease(path) as held:
        assert held
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not os.path.lexists(path)


def test_a_lease_from_the_future_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text(json.dumps({"place": "another machine", "pid": 1, "started": "1", "token": "t"}))
    os.utime(path, (time.time() + 86400,) * 2)
    start = time.monotonic()
    with lease(path) as held:
        assert held
    assert time.monotonic() - start < 5
