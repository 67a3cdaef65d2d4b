"""Errors of the system and of libraries become got, why and fix; a bug stays a bug."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import polars as pl
import pytest
import yaml
from safetensors import safe_open

from residency.core.errors import UserError
from residency.core.guard import explain_error

NUMBERS = [getattr(errno, name) for name in dir(errno) if name.startswith("E") and name not in ("EPIPE", "EAGAIN")]


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_every_error_of_the_system_names_the_file_and_what_to_do(number: int) -> None:
    told = explain_error(OSError(number, os.strerror(number), "some/file"))
    assert told is not None
    assert "some/file" in told.got
    assert os.strerror(number) in told.got
    assert told.why
    assert told.fix


def refusals(folder: Path) -> list[BaseException]:
    """What libraries raise for damaged files and impossible paths."""
    (folder / "x").write_bytes(b"[" * 2000)
    calls = [
        lambda: safe_open(folder / "x", framework="np"),
        lambda: pl.read_parquet(folder / "x"),
        lambda: yaml.safe_load("a: ["),
        lambda: open("a\0b"),  # noqa: SIM115
        lambda: Path("~nobody-of-that-name/x").expanduser(),
        lambda: open("y" * 5000),  # noqa: SIM115
        lambda: (folder / "x" / "y").read_text(),
        lambda: folder.read_text(),
    ]
    found: list[BaseException] = []
    for call in calls:
        with pytest.raises(BaseException) as raised:
            call()
        found.append(raised.value)
    return [*found, RecursionError("maximum recursion depth exceeded"), MemoryError()]


def test_refusals_of_libraries_are_told(tmp_path: Path) -> None:
    for error in refusals(tmp_path):
        told = explain_error(error)
        assert told is not None, repr(error)
        assert told.got
        assert "\n" not in told.got


@pytest.mark.parametrize("bug", [KeyError("x"), AttributeError("x"), AssertionError(), TypeError("x"), ValueError("x")])
def test_a_bug_is_no_mistake_of_the_user(bug: Exception) -> None:
    assert explain_error(bug) is None


def test_a_mistake_stays_as_it_was_told() -> None:
    error = UserError("got", why="why", fix="fix")
    assert explain_error(error) is error
