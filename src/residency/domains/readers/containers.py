"""Containers: JSON Lines, JSON, CSV, TSV, Parquet, Arrow, saved `datasets` folders and hub ids, as records.

Files are parsed here and not by the type inference of `datasets` or pandas, which turn "01234" into a number, "NA" into
nothing and "2020-01-01" into a time: a text stays the text that is in the file.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from residency.core.errors import UserError
from residency.core.types import Split
from residency.domains.readers.records import FileOptions, Record, Records
from residency.domains.readers.strict_json import parse_json, refuse
from residency.domains.readers.text_rows import (
    WHY,
    as_object,
    csv_rows,
    json_rows,
    no_rows,
    not_unicode,
    unpacked_limit,
    unreadable,
)

__all__ = ["SUFFIXES", "read_file", "split_files", "suffix_of"]


def read_file(name: str, split: Split, options: FileOptions) -> Records:
    """All records of a file.

    Args:
        name: Its path; the suffix says what it is. `.gz` behind it is unpacked.
        split: What it is read for, in messages.
        options: What the name does not tell.

    Raises:
        UserError: It cannot be read, holds no row, or holds what has no certain meaning; with its line.
    """
    path, suffix = Path(name).expanduser(), suffix_of(name)
    if suffix in (".parquet", ".arrow"):
        from residency.domains.readers.arrow_tables import read_arrow_file

        found = read_arrow_file(path, name, split)
    elif suffix in _READERS:
        found = _READERS[suffix](_text(path, name, split, options), name, options)
    else:
        raise UserError(
            f"{split} file {name!r} ends in {suffix or 'no suffix'}",
            why="the suffix says how a file is read",
            fix=f"name it {', '.join(sorted(_READERS))}, .parquet or .arrow (text files also with .gz)",
        )
    if not found.rows and found.document is None:
        raise no_rows(split, name)
    return found


def suffix_of(name: str) -> str:
    """What a name says of its file: its last suffix, in small letters, that is not `.gz`."""
    return next((s.lower() for s in reversed(Path(name).suffixes) if s.lower() != ".gz"), "")


def split_files(folder: Path) -> dict[Split, str]:
    """The files of a folder by split: `train*`, `validation*`, `valid*`, `dev*` or `eval*`, `test*`.

    Raises:
        UserError: No training file, or two files for one split.
    """
    starts: dict[Split, tuple[str, ...]] = {
        "train": ("train",),
        "validation": ("validation", "valid", "dev", "eval"),
        "test": ("test",),
    }
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name.lower() != "labels.json")
    found: dict[Split, str] = {}
    for split, names in starts.items():
        mine = [p for p in files if p.name.lower().startswith(names)]
        if len(mine) > 1:
            raise UserError(
                f"folder {str(folder)!r} has {', '.join(p.name for p in mine)} for {split}",
                why="one of them would be left out",
                fix="name the files one by one: train, validation, test",
            )
        if mine:
            found[split] = str(mine[0])
    if "train" not in found:
        raise UserError(
            f"folder {str(folder)!r} has {', '.join(p.name for p in files[:8]) or 'no file'}",
            why="its files are found by name: train*, validation* (valid*, dev*, eval*), test*",
            fix="rename the files, or name them one by one: train, validation, test",
        )
    return found


def _text(path: Path, name: str, split: Split, options: FileOptions) -> str:
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = _unpacked(data)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(error, split, name) from error
    try:
        return data.decode(options.encoding).removeprefix("\ufeff")
    except (UnicodeDecodeError, LookupError) as error:
        line = data.count(b"\n", 0, error.start) + 1 if isinstance(error, UnicodeDecodeError) else 1
        raise not_unicode(error, f"{name}, line {line}") from error


def _unpacked(data: bytes) -> bytes:
    """What a gzip file holds; nothing that is all repetitions, which would fill the memory (OSError)."""
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        limit = unpacked_limit(len(data))
        unpacked = file.read(limit + 1)
    if len(unpacked) > limit:
        raise OSError(f"{len(data):,} bytes that unpack to more than {limit:,}")
    return unpacked


def _lines(text: str) -> list[str]:
    # Never `splitlines`: U+2028 and others are text inside of a JSON value. CR alone ends lines in very old files.
    return text.split("\n") if "\n" in text or "\r" not in text else text.split("\r")


def _jsonl(text: str, name: str, options: FileOptions) -> Records:
    lines = _lines(text)
    first = next((n for n, line in enumerate(lines) if line.strip()), 0)
    if len(lines) > first and lines[first].strip() == "[":
        # An array over several lines under the name of JSON Lines.
        return _json(text, name, options)
    return Records(rows=list(json_rows(lines, name)), class_names={})


def _json(text: str, name: str, options: FileOptions) -> Records:
    if not text.strip():
        return Records(rows=[], class_names={})
    fix = "write an array of objects, or one object per line and name the file .jsonl"
    value = parse_json(text, name, why=WHY, fix=fix)
    if isinstance(value, dict):
        return Records(rows=[], class_names={}, document=value)
    if not isinstance(value, list):
        refuse(name, f"{type(value).__name__} instead of an array", why=WHY, fix=fix)
    wheres = [f"{name}, row {n}" for n in range(1, len(value) + 1)]
    rows = [Record(w, n, as_object(v, w)) for n, (w, v) in enumerate(zip(wheres, value, strict=True), 1)]
    return Records(rows=rows, class_names={})


def _csv(text: str, name: str, options: FileOptions) -> Records:
    return _delimited(text, name, options, ",")


def _tsv(text: str, name: str, options: FileOptions) -> Records:
    return _delimited(text, name, options, "\t")


def _delimited(text: str, name: str, options: FileOptions, delimiter: str) -> Records:
    lines = io.StringIO(text, newline="")
    rows = list(csv_rows(lines, name, options, delimiter, longest=2**31 - 1))
    return Records(rows=rows, class_names={})


_READERS: Mapping[str, Callable[[str, str, FileOptions], Records]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
}

SUFFIXES = frozenset({*_READERS, ".parquet", ".arrow"})
"""Of files that hold rows."""
