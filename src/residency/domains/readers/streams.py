"""Files that are larger than memory: their records one after another, of which the reader holds a few.

The records, their numbers and what is refused are those of `read_file`.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from residency.core.errors import UserError
from residency.core.types import Split
from residency.domains.readers.containers import read_file, suffix_of
from residency.domains.readers.records import FileOptions, Record, Records
from residency.domains.readers.text_rows import (
    MAX_LINE,
    csv_rows,
    json_rows,
    no_rows,
    not_unicode,
    unpacked_limit,
    unreadable,
)

__all__ = ["stream_file"]

_BYTES = 4 * MAX_LINE  # of a line; UTF-8 has at most 4 for a character
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def stream_file(name: str, split: Split, options: FileOptions) -> Records:
    """The records of a file, read when they are asked for, once and in order.

    Args:
        name: Its path: JSON Lines, CSV, TSV, Parquet or Arrow; text files also with `.gz`.
        split: What it is read for, in messages.
        options: What the name does not tell.

    Raises:
        UserError: It cannot be read in parts. While it is read: what `read_file` refuses, or it has changed.
    """
    path, suffix = Path(name).expanduser(), suffix_of(name)
    class_names: Mapping[str, Sequence[str]] = {}
    if suffix in (".parquet", ".arrow"):
        from residency.domains.readers.arrow_tables import stream_arrow_file

        rows, class_names = stream_arrow_file(path, name, split)
    elif suffix in (".jsonl", ".ndjson"):
        rows = json_rows(_json_lines(path, name, split, options), name)
    elif suffix in _DELIMITERS:
        lines = _csv_lines(_lines(path, name, split, options))
        rows = csv_rows(lines, name, options, _DELIMITERS[suffix], longest=MAX_LINE)
    elif suffix != ".json":
        return read_file(name, split, options)  # which says what suffixes there are
    else:
        raise UserError(
            f"streaming: true, and the {split} file {name!r} is JSON",
            why="a JSON document is read as a whole; .jsonl, .csv, .tsv, .parquet and .arrow hold row after row",
            fix="write one object per line into a .jsonl file, or leave streaming out",
        )
    return Records(rows=_unchanged(rows, path, split, name), class_names=class_names)


def _unchanged(rows: Iterator[Record], path: Path, split: Split, name: str) -> Iterator[Record]:
    """The same records, if there are any and the file is at their end what it was at their beginning."""
    before, there = _state(path), False
    for record in rows:
        there = True
        yield record
    if _state(path) != before:
        raise UserError(
            f"{split} file {name!r} changed while it was read",
            why="the rows that were kept may be of neither the old file nor the new one",
            fix="wait until the file is written, or read a copy of it",
        )
    if not there:
        raise no_rows(split, name)


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _lines(path: Path, name: str, split: Split, options: FileOptions) -> Iterator[str]:
    """Decoded lines with their ends (LF)."""
    _check_encoding(options, name)
    number = begin = 0
    try:
        size = path.stat().st_size
        packed = path.suffix.lower() == ".gz"
        with _opened(path, packed=packed) as file:
            while data := file.readline(_BYTES + 1):
                number += 1
                where = f"{name}, line {number}"
                if len(data) > _BYTES:
                    raise UserError(
                        f"{where}: more than {_BYTES:,} bytes without a line end",
                        why="a stream is read line by line",
                        fix="write one row per line, each below 16 MiB, with line feeds between them",
                    )
                if packed and begin + len(data) > (limit := unpacked_limit(size)):
                    raise OSError(f"{size:,} bytes that unpack to more than {limit:,}")
                try:
                    text = data.decode(options.encoding)
                except UnicodeDecodeError as error:
                    raise not_unicode(error, where, begin=begin) from error
                yield text.removeprefix("\ufeff") if number == 1 else text
                begin += len(data)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(error, split, name) from error


def _opened(path: Path, *, packed: bool) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if packed else path.open("rb")


def _check_encoding(options: FileOptions, name: str) -> None:
    """Lines are found before they are decoded: line feeds have to be the byte that they are in ASCII."""
    try:
        plain = b"\n\n" in "\n\n".encode(options.encoding)
    except LookupError as error:
        raise not_unicode(error, name) from error
    if not plain:
        raise UserError(
            f"streaming: true, and files.encoding is {options.encoding}",
            why=f"lines of {name!r} are found by their ends, which other bytes of this encoding look like",
            fix="save the file as UTF-8, or leave streaming out",
        )


def _json_lines(path: Path, name: str, split: Split, options: FileOptions) -> Iterator[str]:
    lines = _lines(path, name, split, options)
    blank, first = [], ""
    for first in lines:
        if first.strip():
            break
        blank.append("")
    if first.strip() == "[":
        raise UserError(
            f"streaming: true, and {name!r}, line {len(blank) + 1} begins an array over several lines",
            why="a JSON document is read as a whole",
            fix="write one object per line, or leave streaming out",
        )
    if not blank and "\n" not in first and "\r" in first:
        # A very old file: CR alone ends its lines.
        yield from first.split("\r")
        return
    yield from (line.removesuffix("\n") for line in chain(blank, [first], lines))


def _csv_lines(lines: Iterator[str]) -> Iterator[str]:
    """The lines as Python's `csv` wants them: CR alone ends one as well."""
    for line in lines:
        if "\r" in line.removesuffix("\n").removesuffix("\r"):
            yield from io.StringIO(line, newline="")
        else:
            yield line
