"""Parquet that somebody else may have written: one reader, which looks at the number of rows before it reads any.

Equal values are stored once: 195 kB hold 60,000,000 rows, which take gigabytes of memory to read. Paths are paths:
polars would read `[`, `*` and `?` in them as patterns, and with them rows of another folder.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import polars as pl

__all__ = ["MAX_ROWS", "ROWS_PER_BYTE", "ParquetRefused", "check_row_count", "read_parquet"]

MAX_ROWS = 1_000_000
"""So many rows are read whatever the size of the file."""
ROWS_PER_BYTE = 4
"""Above `MAX_ROWS`, a file with more rows per byte than this holds next to nothing but repetitions."""


class ParquetRefused(ValueError):
    """A file that is no Parquet, or has more rows than its size can mean."""


def check_row_count(path: Path, rows: int, *, size: int) -> None:
    """Refuse a table that is larger in memory than anything its file can mean.

    Args:
        path: The file, for the message.
        rows: That it says to hold.
        size: Bytes of the file.

    Raises:
        ParquetRefused: More than `MAX_ROWS` rows and more than `ROWS_PER_BYTE` for each byte.
    """
    if rows > MAX_ROWS and rows > ROWS_PER_BYTE * size:
        raise ParquetRefused(f"{path} says that it holds {rows:,} rows in {size:,} bytes")


def read_parquet(path: Path, *, columns: list[str] | None = None) -> pl.DataFrame:
    """Read a file.

    Args:
        path: The file; no character of it is a pattern.
        columns: Only these.

    Raises:
        OSError: It cannot be read.
        ParquetRefused: It is not Parquet, is damaged, lacks a column, or `check_row_count` refuses it.
    """
    # As bytes: a path would be taken for a pattern, and a file may be replaced between two looks.
    data = path.read_bytes()
    try:
        rows = int(pl.scan_parquet(BytesIO(data)).select(pl.len()).collect().item())
        check_row_count(path, rows, size=len(data))
        return pl.read_parquet(BytesIO(data), columns=columns)
    # Rust code that meets damage it did not expect panics, with an exception of its own that is no `Exception`.
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, ParquetRefused):
            raise
        raise ParquetRefused(f"{path} cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from error
