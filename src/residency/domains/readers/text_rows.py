"""Lines of text files as records, and what is said of files that cannot be read."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from residency.core.errors import UserError
from residency.core.types import Split
from residency.domains.readers.records import FileOptions, Record
from residency.domains.readers.strict_json import check_text, parse_json, refuse

__all__ = [
    "FIX",
    "MAX_LINE",
    "WHY",
    "as_object",
    "csv_rows",
    "json_rows",
    "no_rows",
    "not_unicode",
    "unpacked_limit",
    "unreadable",
]

MAX_LINE = 16 * 2**20  # characters; a longer line is a file without line ends
MAX_UNPACKED = 64 * 2**20
MAX_RATIO = 200
"""A .gz file may unpack to so many bytes, or to so many times its own size; text is below 20 times."""
WHY = 'every row has to be an object of columns, such as {"prompt": "...", "completion": "..."}'
FIX = 'write {"prompt": "...", "completion": "..."}, or the columns of another format'


def json_rows(lines: Iterable[str], name: str) -> Iterator[Record]:
    """The object of every line that is not blank.

    Args:
        lines: Of the file, without their ends.
        name: Of the file, for messages.

    Raises:
        UserError: A line is no object, or one whose meaning is not certain.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        if len(line) > MAX_LINE:
            refuse(where, f"{len(line):,} characters", why=WHY, fix="write one object per line, each below 16 MiB")
        yield Record(where, number, as_object(parse_json(line, where, why=WHY, fix=FIX), where))


def csv_rows(
    lines: Iterable[str], name: str, options: FileOptions, delimiter: str, *, longest: int
) -> Iterator[Record]:
    """Rows under a header. A cell is the text as written: "NA", "01234" and "" stay what they are.

    Args:
        lines: Of the file, with their ends.
        name: Of the file, for messages.
        options: May name another delimiter.
        delimiter: What the file's suffix means.
        longest: Characters of a cell; a quote that nobody closes would be read to the end of the file.

    Raises:
        UserError: Cells and columns differ in number, or quotes are open.
    """
    csv.field_size_limit(longest)
    reader = csv.reader(
        lines,
        delimiter=options.delimiter or delimiter,
        quoting=csv.QUOTE_MINIMAL if options.quoting == "csv" else csv.QUOTE_NONE,
        strict=True,
    )
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
                refuse(where, got, why=WHY, fix="put cells with delimiters or line ends in double quotes")
            for cell in cells:
                check_text(cell, where, why=WHY)
            yield Record(where, number, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        refuse(f"{name}, line {reader.line_num}", f"not CSV: {error}", why=WHY, fix="mend the quotes of this line")


def as_object(value: Any, where: str) -> Mapping[str, Any]:
    """A value that has columns, or the refusal of one that has none (UserError)."""
    if not isinstance(value, dict):
        kind = type(value).__name__
        refuse(where, f"{kind} {str(value)[:60]!r}", why=WHY, fix=FIX)
    return value


def _header(cells: Sequence[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len({*names}) < len(names) or not all(names):
        fix = "give every column a name of its own in the first line"
        refuse(where, f"header {names}", why="the first line names the columns", fix=fix)
    return names


def no_rows(split: Split, name: str) -> UserError:
    """What is said of an empty file."""
    return UserError(
        f"{split} file {name!r}, line 1: no row in the file",
        why="a split needs at least one row",
        fix=f"write one object per line: {FIX.removeprefix('write ')}",
    )


def unreadable(error: Exception, split: Split, name: str) -> UserError:
    """What is said of a file that the system or its compression does not give."""
    return UserError(
        f"{split} file {name!r}: {getattr(error, 'strerror', None) or error}",
        why="the domain's rows are read from it",
        fix="give the path of a readable file, absolute or relative to the folder you start from",
    )


def not_unicode(error: UnicodeDecodeError | LookupError, where: str, *, begin: int = 0) -> UserError:
    """What is said of bytes that are no text in the encoding, or of an encoding that there is not.

    Args:
        error: Of the decoder.
        where: File and line.
        begin: Bytes of the file before those that were decoded.
    """
    if not isinstance(error, UnicodeDecodeError):
        return UserError(str(error), why="files.encoding names a codec", fix="for example utf-8 or latin-1")
    got = f"text that is not Unicode: byte {begin + error.start} ({error.reason})"
    return UserError(f"{where}: {got}", why=WHY, fix="save the file as UTF-8, or name files.encoding")


def unpacked_limit(size: int) -> int:
    """How many bytes a gzip file of `size` bytes may hold."""
    return max(MAX_UNPACKED, MAX_RATIO * size)
