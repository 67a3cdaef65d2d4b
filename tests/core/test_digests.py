"""Damaged, unreadable and intact files are told apart; records carry their own checksum."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from residency.core.digests import CannotRead, Damaged, check_files, digest_files, seal, unseal

NAMES = ["a.bin", "b [1].txt"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files."""
    for name in NAMES:
        (tmp_path / name).write_bytes(name.encode() * 100)
    return tmp_path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: list[Callable[[Path], None]] = [flip, dangle, loop, pipe, into_folder, Path.unlink, lambda p: os.truncate(p, 3)]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", NAMES)
def test_every_damage_is_seen(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    files = digest_files(folder, NAMES)
    check_files(folder, files)
    damage(folder / name)
    with pytest.raises(Damaged):
        check_files(folder, files)


def test_what_cannot_be_read_is_not_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = digest_files(folder, NAMES)

    def refuse(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    # Root may read everything: the refusal is made by hand.
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CannotRead, match="Permission denied"):
        check_files(folder, files)


def test_a_sealed_record_comes_back_and_a_changed_one_does_not() -> None:
    record = {"means": {"nll": {"a": 0.1}}, "files": {}}
    sealed = json.loads(json.dumps(seal(record)))
    assert unseal(sealed, name="stage.json") == record
    for changed in ({**sealed, "means": {"nll": {"a": 0.2}}}, {**sealed, "new": 1}, record, [], None):
        with pytest.raises(Damaged):
            unseal(changed, name="stage.json")
    assert unseal(record, name="stage.json", required=False) == record
