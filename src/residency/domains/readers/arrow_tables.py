"""Typed tables: Parquet, Arrow, folders of `Dataset.save_to_disk`, and data sets of the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args

from residency.core.errors import UserError
from residency.core.parquet_files import ParquetRefused, check_row_count
from residency.core.types import Split
from residency.domains.readers.records import FileOptions, Record, Records
from residency.domains.readers.strict_json import check_text

__all__ = ["is_saved_dataset", "read_arrow_file", "read_hub", "read_saved_dataset", "stream_arrow_file"]

_AT_ONCE = 100  # rows of a stream that are Python objects at a time
_BUFFER = 2**20  # bytes of a column of Parquet that are read ahead; without it, all of a row group is

_ALIASES: Mapping[str, Split] = {"val": "validation", "valid": "validation", "dev": "validation", "eval": "validation"}
_WHY = "every row has to be an object whose keys are its columns"


def read_arrow_file(path: Path, name: str, split: Split) -> Records:
    """The rows of a Parquet or Arrow file, with the class names that `datasets` wrote into it.

    Raises:
        UserError: It is not there or not what its suffix says.
    """
    with _refusing(name, split):
        table = _parquet(path) if path.suffix.lower() == ".parquet" else _arrow(path)
    return Records(rows=list(_records(table.to_pylist(), name)), class_names=_class_names(table.schema.metadata))


def stream_arrow_file(path: Path, name: str, split: Split) -> tuple[Iterator[Record], Mapping[str, Sequence[str]]]:
    """The same, read when they are asked for, and their class names; a row group of Parquet is read at a time.

    Raises:
        UserError: As of `read_arrow_file`; what lies behind the beginning of the file is refused when it is read.
    """
    parts = (_parquet_parts if path.suffix.lower() == ".parquet" else _arrow_parts)(path)
    with _refusing(name, split):
        schema = next(parts)
    return _records(_objects(parts, name, split), name), _class_names(schema.metadata)


def _objects(parts: Iterator[Any], name: str, split: Split) -> Iterator[Mapping[str, Any]]:
    with _refusing(name, split):
        for part in parts:
            for start in range(0, part.num_rows, _AT_ONCE):
                yield from part.slice(start, _AT_ONCE).to_pylist()


@contextmanager
def _refusing(name: str, split: Split) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException, ParquetRefused) as error:
        raise UserError(
            f"{split} file {name!r}: {str(error).splitlines()[0][:200]}",
            why="the domain's rows are read from it",
            fix="give the path of a readable Parquet or Arrow file, as its suffix says",
        ) from error


def _parquet_parts(path: Path) -> Iterator[Any]:
    """The schema, then the rows."""
    from pyarrow import parquet

    # By default all row groups are read ahead, and stay until the file is closed.
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
        check_row_count(path, file.metadata.num_rows, size=path.stat().st_size)
        yield file.schema_arrow
        yield from file.iter_batches(batch_size=_AT_ONCE, use_threads=False)


def _arrow_parts(path: Path) -> Iterator[Any]:
    """The schema, then the rows."""
    import pyarrow as pa

    size = path.stat().st_size
    with pa.memory_map(str(path)) as source:
        try:
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(n) for n in range(file.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            batches = file = pa.ipc.open_stream(source)
        yield file.schema
        rows = 0
        for batch in batches:
            rows += batch.num_rows
            check_row_count(path, rows, size=size)
            yield batch


def _parquet(path: Path) -> Any:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        # Equal values are stored once: rows are counted before they take memory.
        check_row_count(path, file.metadata.num_rows, size=path.stat().st_size)
        return file.read()


def _arrow(path: Path) -> Any:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            file = pa.ipc.open_file(source)
            batches = [file.get_batch(n) for n in range(file.num_record_batches)]
        except pa.ArrowInvalid:
            source.seek(0)
            file = pa.ipc.open_stream(source)
            batches = list(file)
        # Batches of compressed files become large as Python objects, not before.
        check_row_count(path, sum(batch.num_rows for batch in batches), size=path.stat().st_size)
        return pa.Table.from_batches(batches, schema=file.schema)


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, Sequence[str]]:
    stored = (metadata or {}).get(b"huggingface")
    features = json.loads(stored).get("info", {}).get("features", {}) if stored else {}
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _records(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Record]:
    for number, row in enumerate(rows, 1):
        where = f"{name}, row {number}"
        # Arrow gives every struct all keys of all rows, as nulls: what is null was not there.
        value = {key: _without_nulls(item) for key, item in row.items() if item is not None}
        for text in (item for item in value.values() if isinstance(item, str)):
            check_text(text, where, why=_WHY)
        yield Record(where, number, value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def read_saved_dataset(path: Path, *, streaming: bool = False) -> dict[Split, Records]:
    """The splits of a folder of `save_to_disk`; one data set alone is `train`.

    Args:
        path: The folder.
        streaming: Whether rows are read when they are asked for.

    Raises:
        UserError: The folder is damaged, or has splits whose meaning is not known.
    """
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(path))
    except Exception as error:
        raise UserError(
            f"{str(path)!r}: {str(error)[:200]}",
            why="the folder was written by save_to_disk and cannot be read",
            fix="write it again with this version of datasets, or save it as Parquet",
        ) from error
    parts = dict(found) if isinstance(found, DatasetDict) else {"train": found}
    return _splits(parts, str(path), streaming=streaming)


def read_hub(name: str, options: FileOptions, *, streaming: bool = False) -> dict[Split, Records]:
    """The splits of a data set of the hub (or of its cache).

    Args:
        name: Its id.
        options: Configuration and revision.
        streaming: Whether rows are read, from the copy in the cache, when they are asked for.

    Raises:
        UserError: It is neither cached nor reachable.
    """
    from datasets import load_dataset

    try:
        found = load_dataset(name, options.config, revision=options.revision)
    except Exception as error:
        raise UserError(
            f"{name!r}: {type(error).__name__}: {str(error)[:200]}",
            why="it is no file or folder here, and as a hub id it is neither cached nor reachable",
            fix="check the path, or fetch it once (`hf download --repo-type dataset ...`) and name the folder",
        ) from error
    return _splits(dict(found), name, streaming=streaming)


def _splits(parts: Mapping[str, Any], name: str, *, streaming: bool) -> dict[Split, Records]:
    read: dict[Split, Records] = {}
    for key, part in parts.items():
        split = _ALIASES.get(key, cast("Split", key))
        if split not in get_args(Split) or split in read:
            raise UserError(
                f"{name!r} has the splits {', '.join(parts)}",
                why="train, validation (val, valid, dev, eval) and test are read, each once",
                fix="save the splits you mean as files and name them: train, validation, test",
            )
        tables = part.with_format("arrow").iter(_AT_ONCE)
        names = {c: f.names for c, f in part.features.items() if hasattr(f, "names") and hasattr(f, "str2int")}
        rows = _records((row for table in tables for row in table.to_pylist()), f"{name} ({key})")
        read[split] = Records(rows=rows if streaming else list(rows), class_names=names)
    return read
