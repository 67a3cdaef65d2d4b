"""Jsonl: what it reads, and what it says about files it cannot read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.core.errors import UserError
from residency.domains.jsonl import Jsonl


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(name: str, count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {n}", "completion": f"answer {n % 3}", **more} for n in range(count)]


@pytest.fixture
def test_file(tmp_path: Path) -> str:
    return write(tmp_path / "test.jsonl", numbered("test", 3))


def test_three_files_are_three_splits(tmp_path: Path, test_file: str) -> None:
    train = write(tmp_path / "train.jsonl", numbered("train", 5, note="ignored"))
    validation = write(tmp_path / "validation.jsonl", [{"prompt": "v", "completion": " x ", "id": 7, "group": "g"}])
    domain = Jsonl(train=train, validation=validation, test=test_file, kind="label")
    assert {row.id for row in domain.rows("train")} == {f"train:{n}" for n in range(1, 6)}
    (only,) = domain.rows("validation")
    assert (only.id, only.prompt, only.completion, only.group) == ("7", "v", "x", "g")
    assert domain.labels() == ("answer 0", "answer 1", "answer 2", "x")
    assert domain.kind == "label"
    assert [*domain.scorers] == ["nll", "accuracy"]


def test_validation_is_carved_out_of_train_by_group(tmp_path: Path, test_file: str) -> None:
    rows = [row | {"group": f"g{n % 40}"} for n, row in enumerate(numbered("train", 200))]
    domain = Jsonl(train=write(tmp_path / "train.jsonl", rows), test=test_file, max_validation=None)
    train, validation = domain.rows("train"), domain.rows("validation")
    assert len(train) + len(validation) == 200
    assert 0 < len(validation) < 60
    assert not {row.group for row in train} & {row.group for row in validation}
    assert len(domain.rows("test")) == 3
    assert domain.kind == "generative"


def test_a_limit_keeps_a_sample_not_the_first_lines(tmp_path: Path, test_file: str) -> None:
    rows = [{"prompt": f"p{n}", "completion": "a" if n < 500 else "b"} for n in range(1000)]
    train = write(tmp_path / "train.jsonl", rows)
    domain = Jsonl(train=train, validation=test_file, test=write(tmp_path / "e.jsonl", numbered("e", 2)), max_train=100)
    assert 30 < sum(row.completion == "a" for row in domain.rows("train")) < 70


def test_blank_lines_byte_order_marks_and_odd_line_ends_are_read(tmp_path: Path, test_file: str) -> None:
    path = tmp_path / "odd.jsonl"
    separator = "\u2028"
    text = f'\ufeff\n{{"prompt": "a{separator}", "completion": "ä"}}\r\n\n{{"prompt": "b", "completion": "c"}}'
    path.write_bytes(text.encode())
    rows = Jsonl(train=str(path), validation=test_file, test=write(tmp_path / "e.jsonl", numbered("e", 1))).rows(
        "train"
    )
    assert {(row.id, row.prompt, row.completion) for row in rows} == {
        ("train:2", f"a{separator}", "ä"),
        ("train:4", "b", "c"),
    }


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ('{"prompt": "a", "completion"', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["a", "b"]', "list"),
        ("3", "int"),
        ('{"prompt": "a"}', "no 'completion', only ['prompt']"),
        ('{"prompt": 3, "completion": "b"}', "'prompt' is int '3'"),
        ('{"prompt": "a", "completion": ["b"]}', "'completion' is list"),
        ('{"prompt": " \\n ", "completion": "b"}', "'prompt' is empty"),
        ('{"prompt": "a", "completion": ""}', "'completion' is empty"),
        ('{"prompt": "a", "completion": "b", "id": true}', "'id' is bool"),
        ('{"prompt": "a", "completion": "b", "group": ["x"]}', "'group' is list"),
        ('{"prompt": "\\ud800", "completion": "b"}', "not Unicode"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, test_file: str, line: str, got: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(GOOD + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        Jsonl(train=str(path), test=test_file).rows("train")
    assert f"{path}, line 3: " in caught.value.got
    assert got in caught.value.got
    assert '"prompt"' in caught.value.why
    assert caught.value.fix


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path, test_file: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD.encode() + '{"prompt": "ä", "completion": "b"}'.encode("latin-1"))
    with pytest.raises(UserError, match="line 2: text that is not Unicode"):
        Jsonl(train=str(path), test=test_file).rows("train")


def test_missing_and_empty_files_are_named(tmp_path: Path, test_file: str) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        Jsonl(train=str(tmp_path / "nowhere.jsonl"), test=test_file).rows("train")
    with pytest.raises(UserError, match="train file"):
        Jsonl(train=str(tmp_path), test=test_file).rows("train")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    with pytest.raises(UserError, match=r"empty\.jsonl', line 1"):
        Jsonl(train=str(empty), test=test_file).rows("train")


@settings(deadline=None, database=None, max_examples=40)
@given(st.binary(max_size=60))
def test_no_file_crashes_the_reader(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    folder = tmp_path_factory.mktemp("noise")
    path = folder / "noise.jsonl"
    path.write_bytes(noise)
    with pytest.raises(UserError):
        Jsonl(train=str(path), test=write(folder / "t.jsonl", numbered("test", 1))).rows("train")


def test_the_fingerprint_does_not_depend_on_where_the_files_are(tmp_path: Path) -> None:
    prints = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        train = write(tmp_path / name / "train.jsonl", numbered("train", 30))
        test = write(tmp_path / name / "test.jsonl", numbered("test", 3))
        prints.add(Jsonl(train=train, test=test).fingerprint())
    assert len(prints) == 1
