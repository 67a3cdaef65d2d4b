"""A cleaned copy says what the original said, whatever its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from residency.core.types import Row
from residency.domains import Table
from residency.domains.doctor.clean import write_cleaned
from residency.domains.doctor.finding import Column
from residency.domains.readers.formats import Format, RowMaker
from residency.domains.readers.records import Record

ASK = {"role": "user", "content": "Which one?"}
ROWS: dict[Format, list[dict[str, Any]]] = {
    "completion": [{"prompt": "a", "completion": "b", "weight": 2.0, "references": ["c"], "group": "g"}],
    "text": [{"text": "All of it."}],
    "prompt": [{"prompt": "2 + 2", "solution": "4", "level": 0}, {"prompt": [ASK], "solution": "4", "level": 3}],
    "pair": [
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.0},
        {"prompt": "a", "chosen": "b", "rejected": "d"},
        {
            "prompt": [ASK],
            "chosen": [{"role": "assistant", "content": "This."}],
            "rejected": [{"role": "assistant", "content": "That."}],
        },
    ],
    "unpaired": [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "completion": "c", "label": False},
    ],
    "labelled": [{"text": "fine", "label": "good"}, {"text": "poor", "label": "bad"}],
    "messages": [{"messages": [ASK, {"role": "assistant", "content": "This."}]}],
}


def rows_of(format: Format, records: list[dict[str, Any]]) -> list[Row]:
    maker = RowMaker(format=format, prefix="row")
    return [maker.row(Record(f"line {k}", k, record)) for k, record in enumerate(records, 1)]


def copied(folder: Path, rows: list[Row]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The records of the cleaned copy, and what was done."""
    domain = Table(train="unread.jsonl", test="unread.jsonl")
    written = write_cleaned(Column(name="d", domain=domain, splits={"train": rows}, given={"train": len(rows)}), folder)
    (file,) = written["files"]
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()], written["done"]


@pytest.mark.parametrize("format", ROWS)
def test_a_copy_is_read_as_the_original(tmp_path: Path, format: Format) -> None:
    rows = rows_of(format, [{"id": str(k), **row} for k, row in enumerate(ROWS[format])])
    records, done = copied(tmp_path, rows)
    assert done == {}
    assert rows_of(format, records) == rows


def test_what_is_said_is_repaired_in_every_part(tmp_path: Path) -> None:
    """A rejected answer and the turns of a conversation too; two pairs of one prompt and answer are two rows."""
    given: list[dict[str, Any]] = [
        {"id": "0", "prompt": "a", "chosen": "b", "rejected": "c &amp; d"},
        {"id": "1", "prompt": "a", "chosen": "b", "rejected": "e"},
        {
            "id": "2",
            "prompt": [{"role": "user", "content": "q\r\nq"}],
            "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "c"}],
        },
    ]
    records, done = copied(tmp_path, rows_of("pair", given))
    kept = rows_of("pair", records)
    assert done == {"texts repaired": 2}
    assert [row.rejected for row in kept] == ["c & d", "e", "c"]
    assert kept[2].messages == ({"role": "user", "content": "q\nq"},)
