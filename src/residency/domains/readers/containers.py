"""Containers: JSON Lines, JSON, CSV, TSV, Parquet, Arrow, saved `datasets` folders and hub ids, as records.

Files are parsed here and not by the type inference of `datasets` or pandas, which turn "01234" into a number, "NA" into
nothing and "2020-01-01" into a time: a text stays the text that is in the file.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from residency.core.errors import UserError
from residency.core.types import Split
from residency.domains.readers.strict_json import check_text, parse_json, refuse

__all__ = ["SUFFIXES", "FileOptions", "Record", "Records", "read_file", "split_files"]

MAX_LINE = 16 * 2**20  # characters; a longer line is a file without line ends
MAX_UNPACKED = 64 * 2**20
MAX_RATIO = 200
"""A .gz file may unpack to so many bytes, or to so many times its own size; text is below 20 times."""
_WHY = 'every row has to be an object of columns, such as {"prompt": "...", "completion": "..."}'
_FIX = 'write {"prompt": "...", "completion": "..."}, or the columns of another format'


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How files are read, where their name does not tell.

    Args:
        delimiter: Between the columns of a CSV file; null = "," for .csv, a tab for .tsv.
        quoting: `csv` = columns in double quotes may hold delimiters and line ends; `none` = a quote is a character.
        encoding: Of text files.
        config: Of a hub id: which of its configurations.
        revision: Of a hub id: branch, tag or commit; what it stands for is recorded.
    """

    delimiter: str | None = None
    quoting: Literal["csv", "none"] = "csv"
    encoding: str = "utf-8"
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One object of a file.

    Args:
        where: File and line, for messages.
        number: Of the line or row, from 1.
        value: Column -> value.
    """

    where: str
    number: int
    value: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What a file holds.

    Args:
        rows: Its objects.
        class_names: Column -> names of its classes, where the file says so (`ClassLabel`).
        document: The one object of a JSON file that is no array of rows (Natural Instructions).
    """

    rows: Sequence[Record]
    class_names: Mapping[str, Sequence[str]]
    document: Mapping[str, Any] | None = None


def read_file(name: str, split: Split, options: FileOptions) -> Records:
    """All records of a file.

    Args:
        name: Its path; the suffix says what it is. `.gz` behind it is unpacked.
        split: What it is read for, in messages.
        options: What the name does not tell.

    Raises:
        UserError: It cannot be read, holds no row, or holds what has no certain meaning; with its line.
    """
    path = Path(name).expanduser()
    suffixes = [s.lower() for s in path.suffixes]
    suffix = next((s for s in reversed(suffixes) if s != ".gz"), "")
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
        raise UserError(
            f"{split} file {name!r}, line 1: no row in the file",
            why="a split needs at least one row",
            fix=f"write one object per line: {_FIX.removeprefix('write ')}",
        )
    return found


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
        raise UserError(
            f"{split} file {name!r}: {getattr(error, 'strerror', None) or error}",
            why="the domain's rows are read from it",
            fix="give the path of a readable file, absolute or relative to the folder you start from",
        ) from error
    try:
        return data.decode(options.encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        got = f"text that is not Unicode: byte {error.start} ({error.reason})"
        refuse(f"{name}, line {line}", got, why=_WHY, fix="save the file as UTF-8, or name files.encoding")
    except LookupError as error:
        raise UserError(str(error), why="files.encoding names a codec", fix="for example utf-8 or latin-1") from error


def _unpacked(data: bytes) -> bytes:
    """What a gzip file holds; nothing that is all repetitions, which would fill the memory (OSError)."""
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        limit = max(MAX_UNPACKED, MAX_RATIO * len(data))
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
    return Records(rows=list(_objects(lines, name)), class_names={})


def _objects(lines: Sequence[str], name: str) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        if len(line) > MAX_LINE:
            refuse(where, f"{len(line):,} characters", why=_WHY, fix="write one object per line, each below 16 MiB")
        yield Record(where, number, _object(parse_json(line, where, why=_WHY, fix=_FIX), where))


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        kind = type(value).__name__
        refuse(where, f"{kind} {str(value)[:60]!r}", why=_WHY, fix=_FIX)
    return value


def _json(text: str, name: str, options: FileOptions) -> Records:
    if not text.strip():
        return Records(rows=[], class_names={})
    fix = "write an array of objects, or one object per line and name the file .jsonl"
    value = parse_json(text, name, why=_WHY, fix=fix)
    if isinstance(value, dict):
        return Records(rows=[], class_names={}, document=value)
    if not isinstance(value, list):
        refuse(name, f"{type(value).__name__} instead of an array", why=_WHY, fix=fix)
    wheres = [f"{name}, row {n}" for n in range(1, len(value) + 1)]
    rows = [Record(w, n, _object(v, w)) for n, (w, v) in enumerate(zip(wheres, value, strict=True), 1)]
    return Records(rows=rows, class_names={})


def _csv(text: str, name: str, options: FileOptions) -> Records:
    return _delimited(text, name, options, ",")


def _tsv(text: str, name: str, options: FileOptions) -> Records:
    return _delimited(text, name, options, "\t")


def _delimited(text: str, name: str, options: FileOptions, delimiter: str) -> Records:
    """Rows under a header. A cell is the text as written: "NA", "01234" and "" stay what they are."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=options.delimiter or delimiter,
        quoting=csv.QUOTE_MINIMAL if options.quoting == "csv" else csv.QUOTE_NONE,
        strict=True,
    )
    rows: list[Record] = []
    header: list[str] = []
    try:
        for number, cells in enumerate(reader, 1):
            where = f"{name}, line {reader.line_num}"
            if not cells:
                continue
            if not header:
                header = _header(cells, where)
                continue
            if len(cells) != len(header):
                got = f"{len(cells)} cells under {len(header)} columns ({', '.join(header)})"
                refuse(where, got, why=_WHY, fix="put cells with delimiters or line ends in double quotes")
            for cell in cells:
                check_text(cell, where, why=_WHY)
            rows.append(Record(where, number, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        refuse(f"{name}, line {reader.line_num}", f"not CSV: {error}", why=_WHY, fix="mend the quotes of this line")
    return Records(rows=rows, class_names={})


def _header(cells: Sequence[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len({*names}) < len(names) or not all(names):
        fix = "give every column a name of its own in the first line"
        refuse(where, f"header {names}", why="the first line names the columns", fix=fix)
    return names


_READERS: Mapping[str, Callable[[str, str, FileOptions], Records]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
}

SUFFIXES = frozenset({*_READERS, ".parquet", ".arrow"})
"""Of files that hold rows."""
