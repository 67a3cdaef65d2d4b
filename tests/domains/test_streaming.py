"""Training sets that are larger than memory: the same rows as without streaming, and nothing else held."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.core.errors import UserError
from residency.core.types import Row
from residency.domains import Table, streamed_rows
from residency.domains import table as table_module
from residency.domains.kept_rows import KeptRows, keep_rows
from residency.domains.narrowed import limited
from residency.domains.readers.records import FileOptions
from residency.domains.readers.streams import stream_file
from residency.domains.splits import hash_order, split_by_group
from support.format_files import lines

MANY = 1_250  # more than are looked at for the columns, and than are read at once
LIMITS: dict[str, Any] = {"max_train": 40, "max_validation": 7, "max_test": 9}


def values(many: int = MANY) -> list[dict[str, Any]]:
    """Rows with groups of three, columns that no format reads, and answers with blanks around them."""
    return [
        {
            "question": f"what,\nis\u2028{n}?",
            "completion": f" {n} " if n % 5 else str(n),
            "group": f"g{n // 3}",
            "note": "unread" * (n % 2),
        }
        for n in range(many)
    ]


def write_csv(path: Path, rows: Iterable[dict[str, Any]], delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(values(1)[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=500)


def write_arrow(path: Path, rows: list[dict[str, Any]], *, stream: bool = False) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    with (
        pa.OSFile(str(path), "wb") as file,
        (pa.ipc.new_stream if stream else pa.ipc.new_file)(file, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=300)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "a.jsonl": lambda path, rows: path.write_text("\ufeff\n" + lines(rows), encoding="utf-8") and None,
    "a.ndjson": lambda path, rows: path.write_bytes(lines(rows).replace("\n", "\r").encode()) and None,
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows).encode())) and None,
    "a.csv": write_csv,
    "a.tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "a.parquet": write_parquet,
    "a.arrow": write_arrow,
    "stream.arrow": lambda path, rows: write_arrow(path, rows, stream=True),
}


def same(**options: Any) -> Table:
    """A streamed table that has been compared with the one that is read as a whole."""
    whole, streamed = Table(**options), Table(streaming=True, **options)
    for split in ("train", "validation", "test"):
        assert streamed.rows(split) == whole.rows(split)
    assert streamed.fingerprint() == whole.fingerprint()
    assert (streamed.given, streamed.unread) == (whole.given, whole.unread)
    return streamed


@pytest.mark.parametrize("name", WRITERS)
def test_a_stream_keeps_the_rows_that_reading_as_a_whole_keeps(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path, values())
    options = {"train": str(path), "columns": {"prompt": "question"}}
    table = same(**options, **LIMITS)
    assert {split: len(table.rows(split)) for split in ("train", "validation", "test")} == {
        "train": 40,
        "validation": 7,
        "test": 9,
    }
    assert sum(table.given.values()) == MANY
    assert [(one.what, one.count) for one in table.unread] == [("blanks", MANY * 4 // 5), ("columns", 1)]
    # With a test file of its own, all training rows that are not validation are candidates.
    test = tmp_path / "held.jsonl"
    test.write_text(lines([{"question": "other", "completion": "x"}]), encoding="utf-8")
    with_test = same(**options, test=str(test), max_train=MANY, max_validation=5)
    assert with_test.given["train"] == len(with_test.rows("train"))
    assert len(with_test.rows("test")) == 1


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["", "x", "y"])), max_size=12),
    st.integers(0, 9),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_kept_rows_are_the_beginning_of_the_hash_order(rows: list[tuple[str, str]], limit: int, drawn: bool) -> None:
    made = [Row(id=i, prompt=str(n), completion="", group=group) for n, (i, group) in enumerate(rows)]
    kept = KeptRows(limit)
    for row in made:
        kept.add(row)
    assert kept.rows() == hash_order(made)[:limit]
    found = {"train": iter(made)} if drawn else {"train": iter(made), "validation": iter(()), "test": iter(())}
    dealt = split_by_group(made) if drawn else {"train": hash_order(made), "validation": [], "test": []}
    split = keep_rows(found, {"train": limit, "validation": None, "test": 2})  # type: ignore[arg-type]
    assert split["train"].rows() == dealt["train"][:limit]
    assert split["validation"].rows() == dealt["validation"]
    assert split["test"].rows() == dealt["test"][:2]
    assert {name: part.added for name, part in split.items()} == {name: len(part) for name, part in dealt.items()}


def test_saved_data_sets_folders_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"prompt": f"p{n}", "label": n % 2} for n in range(MANY)]
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    parts = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(rows, features=features),
            "test": datasets.Dataset.from_list([{"prompt": "t", "label": 1}], features=features),
        }
    )
    parts.save_to_disk(str(tmp_path / "saved"))
    saved = same(path=str(tmp_path / "saved"), max_train=10, max_validation=5)
    assert {row.completion for row in saved.rows("train")} == {"no", "yes"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: parts)
    hub = same(path="someone/something", max_train=10, max_validation=5)
    assert hub.rows("train") == saved.rows("train")
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines({"prompt": f"p{n}", "completion": "x"} for n in range(50)))
    (folder / "test.json").write_text(json.dumps([{"prompt": "t", "completion": "x"}]))
    assert len(same(path=str(folder), max_train=10, max_validation=5).rows("test")) == 1
    (folder / "labels.json").write_text('["x"]')
    with pytest.raises(UserError, match="O-LoRA"):
        Table(path=str(folder), streaming=True, max_train=10, max_validation=5).rows("train")


def peak(table: Table) -> int:
    """Most bytes that Python holds while the rows are read."""
    tracemalloc.start()
    try:
        assert len(table.rows("train")) == 20
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_memory_is_that_of_what_is_kept(suffix: str, tmp_path: Path) -> None:
    def table(many: int) -> Table:
        path = tmp_path / f"{many}.{suffix}"
        rows = [{"prompt": f"{n}" * 20, "completion": f"{n:06d}" * 400} for n in range(many)]
        if suffix == "csv":
            path.write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows))
        else:
            WRITERS[f"a.{suffix}"](path, rows)
        return Table(train=str(path), streaming=True, max_train=20, max_validation=5, max_test=5)

    small, large = peak(table(1_000)), peak(table(3_500))
    # Beside the kept rows there are those that are looked at for the columns, however many follow.
    assert large < 1.25 * small
    assert large < 3_500 * 2_500 / 2  # of the file


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables_of_arrow_are_held_in_parts(suffix: str, tmp_path: Path) -> None:
    """Buffers of Arrow are not Python's: they have a count of their own."""
    import pyarrow as pa

    drawn = random.Random(0)
    rows = [{"prompt": f"p{n}", "completion": f"{drawn.getrandbits(4_000):x}"} for n in range(10_000)]
    path = tmp_path / f"a.{suffix}"
    WRITERS[path.name](path, rows)
    del rows
    before, most = pa.total_allocated_bytes(), 0
    for number, _ in enumerate(stream_file(str(path), "train", FileOptions()).rows):
        if number % 50 == 0:
            most = max(most, pa.total_allocated_bytes() - before)
    assert path.stat().st_size > 9e6
    assert most < 2.5e6


BAD: dict[str, tuple[str, bytes]] = {
    "not JSON": ("a.jsonl", b'{"prompt": "p", "completion": "c"}\n' * 1_100 + b"{\n"),
    "a list": ("a.jsonl", b"\n\n[1]\n"),
    "not UTF-8": ("a.jsonl", b'{"prompt": "p", "completion": "c"}\n' * 3 + b'{"prompt": "\xff"}\n'),
    "no row": ("a.jsonl", b"\n\n"),
    "nothing": ("a.csv", b""),
    "short line": ("a.csv", b"prompt,completion\n" + b"p,c\n" * 1_100 + b"p\n"),
    "open quote": ("a.csv", b'prompt,completion\np,"c\n'),
    "no number": ("a.jsonl", b'{"prompt": "p", "completion": "c"}\n' * 1_100 + b'{"prompt": "p", "completion": 5}\n'),
    "gzip of nothing": ("a.jsonl.gz", b"no gzip"),
    "gzip cut off": ("a.jsonl.gz", gzip.compress(b'{"prompt": "p", "completion": "c"}\n' * 1_100)[:-9]),
    "no Parquet": ("a.parquet", b"PAR1 but no more"),
    "no Arrow": ("a.arrow", b"ARROW1 but no more"),
    "columns": ("a.jsonl", b'{"x": "p", "y": "c"}\n'),
    "suffix": ("a.txt", b"x"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_is_refused_with_the_same_words(case: str, tmp_path: Path) -> None:
    name, data = BAD[case]
    (tmp_path / name).write_bytes(data)
    said = []
    for streaming in (False, True):
        with pytest.raises(UserError) as caught:
            Table(train=str(tmp_path / name), streaming=streaming, **LIMITS).rows("train")
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_what_cannot_be_streamed_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines({"prompt": f"p{n}", "completion": "c"} for n in range(50)), encoding="utf-8")

    def refused(file: Path = path, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            Table(train=str(file), streaming=True, **options).rows("train")
        return str(caught.value)

    assert "without max_train and max_validation and max_test" in refused()
    assert "give a test file" in refused(max_train=5, max_validation=5).replace("or give", "give")
    assert "max_train" in refused(test=str(path), validation=str(path))
    assert "max_test" not in refused(test=str(path), validation=str(path))
    # The limit of the whole stream of domains is one, too.
    most = {"train": 5, "validation": 3, "test": 3}
    (table,) = limited({"a": Table(train=str(path), streaming=True)}, most).values()  # type: ignore[arg-type]
    assert len(table.rows("train")) == 5
    (loose,) = limited({"a": Table(train=str(path), streaming=True)}, {"test": 3}).values()
    with pytest.raises(UserError, match="max_train and max_validation"):
        loose.rows("train")
    array = tmp_path / "a.json"
    array.write_text("[]")
    assert "one object per line" in refused(array, **LIMITS)
    path.write_text('[\n{"prompt": "p", "completion": "c"}\n]')
    assert "array over several lines" in refused(**LIMITS)
    assert "save the file as UTF-8" in refused(files=FileOptions(encoding="utf-16-le"), **LIMITS)
    assert "for example utf-8" in refused(files=FileOptions(encoding="no such"), **LIMITS)


def test_a_file_that_changes_under_the_reader_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines({"prompt": f"p{n}", "completion": "c"} for n in range(50)), encoding="utf-8")
    rows = iter(stream_file(str(path), "train", FileOptions()).rows)
    next(rows)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "late", "completion": "c"}\n')
    with pytest.raises(UserError, match="changed while it was read"):
        list(rows)


@pytest.fixture
def passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were gone through, with a cache of this test's own that trusts files at once."""
    found: list[str] = []

    def stream(name: str, split: Any, options: FileOptions) -> Any:
        found.append(Path(name).name)
        return stream_file(name, split, options)

    monkeypatch.setenv("RESIDENCY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(streamed_rows, "_SETTLED", -1.0)
    monkeypatch.setattr(table_module, "stream_file", stream)
    return found


def chat(number: int) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": [number, {"y": None}]}}}
    turns = [
        {"role": "user", "content": f"q{number}"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "name": "f"},
        {"role": "assistant", "content": f" a{number}"},
    ]
    return {"messages": turns, "references": ["b"], "weight": 0.1 + number}


def test_one_pass_serves_all_processes_until_the_file_or_the_question_changes(
    tmp_path: Path, passes: list[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines(map(chat, range(80))), encoding="utf-8")

    def read(**options: Any) -> Table:
        return same(train=str(path), **{**LIMITS, **options})

    first, again = read(), read()
    assert passes == ["a.jsonl"]
    for split in ("train", "validation", "test"):
        assert again.rows(split) == first.rows(split)
    assert first.given == again.given
    read(max_train=3)
    read(split_turns=True)
    read(strip=False)
    assert len(passes) == 4
    # The same size, and the time that it had: what was written there is another file all the same.
    before = path.stat()
    path.write_text(lines(map(chat, range(79, -1, -1))), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    read()
    assert len(passes) == 5
    kept = max((tmp_path / "cache" / "rows").glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    kept.write_bytes(kept.read_bytes().replace(b"q1", b"q2"))
    read()
    assert len(passes) == 6, "what is damaged is read again"
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        Table(train=str(path), streaming=True, **LIMITS).rows("train")


def test_a_file_that_was_just_written_is_not_remembered(
    tmp_path: Path, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_rows, "_SETTLED", 1e6)
    path = tmp_path / "a.jsonl"
    path.write_text(lines(map(chat, range(80))), encoding="utf-8")
    for _ in range(2):
        same(train=str(path), **LIMITS)
    assert passes == ["a.jsonl"] * 2
    assert not (tmp_path / "cache" / "rows").exists()
