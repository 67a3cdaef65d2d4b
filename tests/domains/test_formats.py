"""Every format and container: the same five rows from each, and the same tokens."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from residency.core.errors import UserError
from residency.core.types import Row
from residency.domains import Table
from residency.testing.tiny_models import write_tokenizer
from support.format_files import CHATS, FIVE, TEXTS, lines, plain, said


def read(path: Path, **options: Any) -> list[Row]:
    test = path.parent / "held-out.jsonl"
    test.write_text(lines([{"prompt": "other", "completion": "x"}]), encoding="utf-8")
    table = Table(train=str(path), test=str(test), validation=str(test), **options)
    return sorted(table.rows("train"), key=lambda row: int(row.id.partition(":")[2]))


def tokens(rows: list[Row], template: Any, folder: Path) -> list[Any]:
    tokenizer = write_tokenizer(folder)
    found = [template.encode(tokenizer, domain="d", row=row) for row in rows]
    return [(e.prompt, [branch.tokens for branch in e.branches]) for e in found]


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_of_prompts_gives_the_same_rows_and_tokens(name: str, tmp_path: Path) -> None:
    suffix, text = TEXTS[name]
    (tmp_path / f"a.{suffix}").write_bytes(text(FIVE).encode())
    rows = read(tmp_path / f"a.{suffix}")
    start = "Definition: d\n\nNow complete the following example -\nInput: " if name == "superni" else ""
    end = "\nOutput: " if name == "superni" else ""
    assert [(row.prompt, row.completion) for row in rows] == [(start + p + end, c) for p, c in FIVE]
    expected = [
        (tuple(byte + 1 for byte in ids(f"{start}{p}{end}\n")), [(*(b + 1 for b in ids(f" {c}")), 0)]) for p, c in FIVE
    ]
    assert tokens(rows, Table.default_template, tmp_path) == expected


def ids(text: str) -> list[int]:
    """Places of the UTF-8 bytes of a text in the byte alphabet, sorted as `write_tokenizer` sorts it."""
    from tokenizers import pre_tokenizers

    shown = "".join(piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [alphabet.index(symbol) for symbol in shown]


@pytest.mark.parametrize("name", CHATS)
def test_every_file_of_conversations_gives_the_same_turns(name: str, tmp_path: Path) -> None:
    suffix, text = CHATS[name]
    (tmp_path / f"a.{suffix}").write_bytes(text(FIVE).encode())
    rows = read(tmp_path / f"a.{suffix}")
    assert [(row.prompt, row.completion) for row in rows] == FIVE
    assert [[dict(turn) for turn in row.messages] for row in rows] == [said(p, c) for p, c in FIVE]


def test_typed_tables_and_packed_files_give_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    from pyarrow import parquet

    table = pa.Table.from_pylist(plain(FIVE))
    parquet.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(plain(FIVE)).encode()))
    for name in ("a.parquet", "a.arrow", "a.jsonl.gz"):
        assert [(row.prompt, row.completion) for row in read(tmp_path / name)] == FIVE, name
    names = [c for _, c in FIVE]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    numbered = Dataset.from_list([{"text": p, "label": k} for k, (p, _) in enumerate(FIVE)], features=features)
    DatasetDict(
        {"train": numbered, "test": Dataset.from_list([{"text": "t", "label": 0}], features=features)}
    ).save_to_disk(str(tmp_path / "saved"))
    saved = Table(path=str(tmp_path / "saved"))
    assert saved.kind == "label"
    found = [(row.prompt, row.completion) for split in ("train", "validation") for row in saved.rows(split)]  # type: ignore[arg-type]
    assert sorted(found) == sorted(FIVE)


def test_pairs_texts_prompts_and_o_lora_folders(tmp_path: Path) -> None:
    pair = tmp_path / "pair.jsonl"
    turns = [{"prompt": said(p, c)[:1], "chosen": said(p, c)[1:], "rejected": said(p, "no")[1:]} for p, c in FIVE]
    for rows in ([{"prompt": p, "chosen": c, "rejected": "no"} for p, c in FIVE], turns):
        pair.write_text(lines(rows), encoding="utf-8")
        found = read(pair)
        assert [(r.kind, r.prompt, r.completion, r.rejected) for r in found] == [("pair", p, c, "no") for p, c in FIVE]
    text = tmp_path / "text.jsonl"
    text.write_text(lines([{"text": p} for p, _ in FIVE]), encoding="utf-8")
    assert [(r.kind, r.completion) for r in read(text)] == [("text", p) for p, _ in FIVE]
    ask = tmp_path / "ask.jsonl"
    ask.write_text(lines([{"prompt": p, "gold": c} for p, c in FIVE]), encoding="utf-8")
    assert [(r.kind, r.prompt, r.extra) for r in read(ask)] == [("prompt", p, {"gold": c}) for p, c in FIVE]
    folder = tmp_path / "SC" / "toy"
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text('["Good", "Bad"]')
    for split in ("train", "dev", "test"):
        rows = [{"sentence": f"{split} {k}", "label": ["Good", "Bad"][k % 2]} for k in range(40)]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    olora = Table(path=str(folder))
    assert (olora.kind, olora.labels()) == ("label", ("Bad", "Good"))
    assert len(olora.rows("train")) + len(olora.rows("validation")) == 40
    question = "What is the sentiment of the following paragraph? Choose one from the option.\n"
    prompt = f"{question}Option: Good, Bad \ntest 3\nAnswer:"
    assert any((row.prompt, row.completion) == (prompt, "Bad") for row in olora.rows("test"))


@pytest.mark.parametrize(
    ("text", "options", "got"),
    [
        ('{"prompt": "a", "completion": "b", "label": "c"}', {}, "could be completion"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', {}, "key 'prompt' twice"),
        ('{"prompt": "a", "completion": NaN}', {}, "NaN is no JSON value"),
        ('{"prompt": "a\\u0000", "completion": "b"}', {}, "control character U+0000"),
        ('{"x": "a", "y": "b"}', {}, "columns x, y"),
        ('{"x": "a", "y": "b"}', {"columns": {"prompt": "z"}}, "columns.prompt: z, and the columns are"),
        ('{"chosen": "a", "rejected": "b"}', {}, "without a prompt"),
        ('{"prompt": "p", "chosen": "a", "rejected": "a"}', {}, "equal"),
        ('{"text": "a", "label": 1}', {}, "no names of classes"),
        ('{"messages": []}', {}, "messages are"),
        ('{"messages": [{"role": "user", "content": "a"}]}', {}, "last turn is of user"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}', {}, "empty answer"),
        ('{"messages": [{"role": "poet", "content": "a"}]}', {}, "role 'poet'"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', {}, "no text"),
        ('{"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}', {}, "in a row"),
        ('{"prompt": "a", "completion": "b", "weight": 0}', {}, "'weight' is"),
        ('{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}', {}, "'completion' is str"),
    ],
)
def test_what_has_no_certain_meaning_is_refused(text: str, options: dict[str, Any], got: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.jsonl", **options)
    assert got in caught.value.got
    assert caught.value.fix


def test_csv_with_ragged_lines_or_without_a_header_is_refused(tmp_path: Path) -> None:
    for text, got in (("prompt,completion\na,b,c\n", "3 cells under 2 columns"), ("a,a\n1,2\n", "header")):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(UserError, match=got):
            read(tmp_path / "a.csv")


def test_columns_are_renamed_and_answers_split_into_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"q": p, "a": c, "note": 1} for p, c in FIVE]), encoding="utf-8")
    (tmp_path / "other.jsonl").write_text(lines([{"q": "other", "a": "x"}]), encoding="utf-8")
    other = str(tmp_path / "other.jsonl")
    renamed = Table(
        train=str(tmp_path / "a.jsonl"), test=other, validation=other, columns={"prompt": "q", "completion": "a"}
    )
    assert sorted((row.prompt, row.completion) for row in renamed.rows("train")) == sorted(FIVE)
    (tmp_path / "b.jsonl").write_text(lines([{"messages": [*said("a", "b"), *said("c", "d")]}]), encoding="utf-8")
    (tmp_path / "held-out.jsonl").write_text(lines([{"messages": said("e", "f")}]), encoding="utf-8")
    split = Table(train=str(tmp_path / "b.jsonl"), test=str(tmp_path / "held-out.jsonl"), split_turns=True)
    first, second = split.rows("train")
    assert {(first.completion, second.completion)} <= {("b", "d"), ("d", "b")}
    assert first.group == second.group


WORDS = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        "prompt",
        "completion",
        "messages",
        "text",
        "label",
        "chosen",
        "rejected",
        "conversations",
        "instruction",
        "output",
        "id",
        "group",
        "weight",
        "references",
        "tools",
        "answer",
        "question",
        "role",
        "content",
    ]
)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": VALUES})
ROW = st.dictionaries(KEYS, st.one_of(VALUES, st.lists(TURN, max_size=3)), max_size=5)


FUZZ: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=300, **FUZZ)
@given(st.lists(ROW, min_size=1, max_size=3))
def test_any_json_gives_rows_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    _read_and_made(tmp_path_factory, rows)


@pytest.mark.slow
@settings(max_examples=2000, **FUZZ)
@given(st.lists(ROW, min_size=1, max_size=3))
def test_two_thousand_of_any_json_do(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    _read_and_made(tmp_path_factory, rows)


def _read_and_made(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    from residency.domains.readers.columns import infer_format
    from residency.domains.readers.containers import read_file
    from residency.domains.readers.formats import RowMaker
    from residency.domains.readers.records import FileOptions

    path = Path(tmp_path_factory.getbasetemp()) / "fuzz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.suppress(UserError):
        records = read_file(str(path), "train", FileOptions()).rows
        maker = RowMaker(format=infer_format(records, "fuzz"), prefix="train")
        made = [maker.row(record) for record in records]
        assert len(made) == len(rows)
        assert all(row.id and (row.completion.strip() or row.kind == "prompt") for row in made)
