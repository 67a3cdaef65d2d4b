"""What files hold before it is known what it means: objects with the place where they were read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["FileOptions", "Record", "Records"]


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
        rows: Its objects; of a stream they can be gone through once.
        class_names: Column -> names of its classes, where the file says so (`ClassLabel`).
        document: The one object of a JSON file that is no array of rows (Natural Instructions).
    """

    rows: Iterable[Record]
    class_names: Mapping[str, Sequence[str]]
    document: Mapping[str, Any] | None = None
