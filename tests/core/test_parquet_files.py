"""One reader of Parquet: rows are counted before they are read, paths are no patterns, damage is told."""

from __future__ import annotations

import random
import resource
from contextlib import suppress
from pathlib import Path

import polars as pl
import pytest

from residency.core.parquet_files import MAX_ROWS, ParquetRefused, read_parquet

FRAME = pl.DataFrame({"row": ["a", "b"], "value": [0.25, None]})


@pytest.mark.parametrize("name", ["[ab].parquet", "*.parquet", "what?.parquet", "~nobody.parquet", "ü\u2028.parquet"])
def test_a_path_is_a_path(tmp_path: Path, name: str) -> None:
    FRAME.write_parquet(tmp_path / "a.parquet")
    FRAME.head(1).write_parquet(tmp_path / "other.parquet")
    (tmp_path / "a.parquet").rename(tmp_path / name)
    assert read_parquet(tmp_path / name).equals(FRAME)
    assert read_parquet(tmp_path / name, columns=["value"]).columns == ["value"]


def test_a_file_of_repetitions_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.parquet"
    pl.DataFrame({"x": pl.repeat(1, 2 * MAX_ROWS, eager=True)}).write_parquet(bomb)
    assert bomb.stat().st_size < 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ParquetRefused, match="2,000,000 rows"):
        read_parquet(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_many_rows_with_different_values_are_read(tmp_path: Path) -> None:
    large = pl.DataFrame({"x": pl.int_range(MAX_ROWS + 1, eager=True)})
    large.write_parquet(tmp_path / "large.parquet")
    assert read_parquet(tmp_path / "large.parquet").height == MAX_ROWS + 1


def test_damage_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    FRAME.write_parquet(file)
    data, draw = file.read_bytes(), random.Random(0)
    for content in (b"", data[:10], data[: len(data) // 2], b"{}" * 100):
        file.write_bytes(content)
        with pytest.raises(ParquetRefused):
            read_parquet(file)
    for _ in range(100):
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        with suppress(ParquetRefused):
            read_parquet(file)
    with pytest.raises(OSError, match="x"):
        read_parquet(tmp_path / "missing" / "x")
