"""A new class is found by its base, wherever in the folder it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from residency.core.plug_ins import plug_ins


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_classes_are_found_through_their_bases(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        base="class Base: ...\n",
        one="from x import base\nclass One(base.Base): ...\nclass Helper: ...\n",
        deep__two="class _Shared(Base[int]): ...\nclass Two(_Shared): ...\n",
        deep__three="class Three(Two, Other): ...\n",
    )
    assert plug_ins(folder, "Base") == {"One": "one", "Three": "deep.three", "Two": "deep.two"}
    assert plug_ins(folder, "Base", below=False) == {"One": "one"}


def test_one_name_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, one="class One(Base): ...\n", two="class One(Base): ...\n")
    with pytest.raises(ImportError, match="One is defined in two and in one"):
        plug_ins(folder, "Base")
    write(folder, two="class One: ...\n")
    assert plug_ins(folder, "Base") == {"One": "one"}
