"""Examples as arrays: the same examples back, from memory and from a file that is what it was written as or nothing."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import residency.domains.training_tokens as training_tokens_module
from residency.core.errors import UserError
from residency.core.types import Branch, Example, Row, Stage
from residency.domains import Chat
from residency.domains.packed_examples import ExamplePacker, PackedExamples, open_examples, write_examples
from residency.domains.stream_data import StreamData
from residency.domains.table import Table
from residency.domains.template import Template
from residency.domains.training_tokens import tokens_key
from residency.testing.tiny_models import write_tokenizer

KEY = "k"
ids = st.integers(0, 2**31 - 1)


@st.composite
def branches(draw: st.DrawFn) -> Branch:
    tokens = tuple(draw(st.lists(ids, max_size=6)))
    mask = (
        tuple(draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))) if draw(st.booleans()) else ()
    )
    role: Any = draw(st.sampled_from(["completion", "label", "chosen", "rejected", "rollout"]))
    return Branch(tokens=tokens, mask=mask, role=role, weight=draw(st.floats(allow_nan=False)))


@st.composite
def examples(draw: st.DrawFn) -> Example:
    cuts = draw(st.tuples(st.integers(0, 99), st.integers(0, 99)))
    return Example(
        domain="d",
        row=str(draw(st.integers(0, 9))),
        prompt=tuple(draw(st.lists(ids, min_size=1, max_size=5))),
        branches=tuple(draw(st.lists(branches(), max_size=3))),
        cut_prompt=cuts[0],
        cut_completion=cuts[1],
        extra={"margin": cuts[0]},
    )


def packed(given: list[Example]) -> dict[str, Any]:
    packer = ExamplePacker()
    for example in given:
        packer.add(example)
    return packer.arrays()


def unpacked(arrays: dict[str, Any], given: list[Example]) -> list[Example]:
    found = PackedExamples(arrays)
    assert len(found) == len(given)
    rows = [Row(id=e.row, prompt="", completion="", extra=e.extra) for e in given]
    return [found.at(k, domain="d", row=row) for k, row in enumerate(rows)]


@given(st.lists(examples(), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_examples_come_back_as_they_were(given: list[Example]) -> None:
    # With the fields that take no part in comparisons.
    assert list(map(repr, unpacked(packed(given), given))) == list(map(repr, given))


@given(st.lists(examples(), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_and_through_a_file(tmp_path_factory: pytest.TempPathFactory, given: list[Example]) -> None:
    path = tmp_path_factory.mktemp("f") / "x.safetensors"
    write_examples(path, packed(given), key=KEY, about={"n": 1})
    found = open_examples(path, key=KEY)
    assert found is not None
    assert found[1] == {"n": 1}
    assert list(map(repr, unpacked(found[0], given))) == list(map(repr, given))
    assert open_examples(path, key="another") is None


def test_what_no_template_makes_is_not_packed() -> None:
    plain = Example.of(domain="d", row="1", prompt=(1,), completion=(2,))
    for other in (
        replace(plain, split="test"),
        replace(plain, fewer_shots=1),
        replace(plain, branches=(Branch(tokens=(1,), reference=0.5),)),
    ):
        with pytest.raises(ValueError, match="training row"):
            ExamplePacker().add(other)


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    """Each byte changed, each length cut: never other examples, never another error."""
    given = [Example.of(domain="d", row=str(k), prompt=(k, 1), completion=(2, 3)) for k in range(3)]
    path, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    write_examples(path, packed(given), key=KEY, about={})
    content = path.read_bytes()
    for place in range(len(content)):
        other.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        found = open_examples(other, key=KEY)
        # Bytes between header and data (blanks that align) hold nothing.
        assert found is None or unpacked(found[0], given) == given, place
    for length in range(len(content)):
        other.write_bytes(content[:length])
        assert open_examples(other, key=KEY) is None
    assert open_examples(tmp_path / "missing", key=KEY) is None


def table(folder: Path, *, rows: int = 30, **options: Any) -> Table:
    """Rows of plain text, some of them too long for some templates."""
    folder.mkdir(exist_ok=True)
    for split, many in (("train", rows), ("validation", 2), ("test", 2)):
        lines = [
            {"id": f"{split}{i}", "prompt": f"{split} {i} " + "x" * i, "completion": f"yes {i}"} for i in range(many)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return Table(**files, **options)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every domain is a large one."""
    monkeypatch.setenv("RESIDENCY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(training_tokens_module, "MANY", 1)
    return tmp_path / "cache/tokens"


def trained(domain: Table, tokenizer: Any) -> tuple[list[str], Any]:
    """All examples of an epoch, field by field, and the counts."""
    data = StreamData(domains={"a": domain})
    stage = Stage(index=0, domain="a", stages=1, seed=0, steps=8, batch_size=4)
    seen = data.examples(stage, tokenizer)
    assert [seen.name_at(k) for k in range(len(seen))] == [("a", example.row) for example in seen]
    return [repr(example) for example in seen], data._training_tokens("a", tokenizer).counts


TEMPLATES: dict[str, Any] = {
    "plain": Template(max_tokens=256, tokenise="apart"),
    "together": Template(max_tokens=256, tokenise="together"),
    "dropped": Template(max_tokens=24, tokenise="apart", too_long="drop"),
    "cut": Template(max_tokens=24, tokenise="apart", too_long="truncate"),
    "chat": Chat(jinja="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
                 "{% if add_generation_prompt %}assistant: {% endif %}", max_tokens=256),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_large_domain_trains_on_the_same_examples(
    name: str, tokenizer: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = (table(tmp_path / "d", template=TEMPLATES[name]) for _ in range(2))
    made = trained(first, tokenizer)
    (file,) = cache.glob("*.safetensors")
    monkeypatch.setattr(type(TEMPLATES[name]), "encode", None)  # what is read is not encoded
    assert trained(again, tokenizer) == made
    monkeypatch.undo()
    plain = trained(table(tmp_path / "d", template=TEMPLATES[name]), tokenizer)
    assert plain == made
    assert file.stat().st_size > 0


def test_a_file_that_is_damaged_or_of_others_is_made_again(tokenizer: Any, cache: Path, tmp_path: Path) -> None:
    made = trained(table(tmp_path / "d"), tokenizer)
    (file,) = cache.glob("*.safetensors")
    whole = file.read_bytes()
    other = trained(table(tmp_path / "e", rows=12), tokenizer)
    (foreign,) = {*cache.glob("*.safetensors")} - {file}
    assert other != made
    for content in (b"", whole[:-1], whole[:-9] + b"\xff" * 9, foreign.read_bytes(), b"cos\nsystem\n(S'false'\ntR."):
        file.write_bytes(content)
        assert trained(table(tmp_path / "d"), tokenizer) == made
        assert file.read_bytes() == whole


def test_the_key_changes_with_everything_that_decides_a_token(tokenizer: Any, tmp_path: Path) -> None:
    def key(name: str = "a", tokenizer: Any = tokenizer, rows: int = 30, **options: Any) -> str | None:
        return tokens_key(name, table(tmp_path / str(rows), rows=rows, **options), tokenizer)

    shorter, special = write_tokenizer(tmp_path / "t"), write_tokenizer(tmp_path / "u")
    shorter.model_max_length = 77
    special.add_special_tokens({"additional_special_tokens": ["<new>"]})
    chat = {"template": Chat(jinja="{{ messages[0]['content'] }}")}
    keys = [
        key(), key("b"), key(rows=29), key(tokenizer=shorter), key(tokenizer=special), key(**chat),
        key(template=Chat(jinja="{{ messages[0]['content'] }} ")),
        *(key(template=template) for template in TEMPLATES.values()),
    ]  # fmt: skip
    assert None not in keys
    assert len({*keys}) == len(keys)
    assert key() == keys[0]


def test_what_nobody_can_describe_has_no_key(tokenizer: Any, tmp_path: Path) -> None:
    class Other(Template):
        """Of a user's."""

    assert tokens_key("a", table(tmp_path / "d", template=Other(max_tokens=99, tokenise="apart")), tokenizer) is None
    assert tokens_key("a", table(tmp_path / "d"), object()) is None


def test_too_many_rows_that_are_too_long_write_nothing(tokenizer: Any, cache: Path, tmp_path: Path) -> None:
    domain = table(tmp_path / "d", template=Template(max_tokens=12, tokenise="apart"))
    with pytest.raises(UserError, match="too long"):
        trained(domain, tokenizer)
    assert not list(cache.glob("*.safetensors"))


def test_where_nothing_can_be_written_examples_are_the_same(
    tokenizer: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained(table(tmp_path / "d"), tokenizer)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESIDENCY_CACHE", str(tmp_path / "file"))
    assert trained(table(tmp_path / "d"), tokenizer) == made


def test_two_writers_at_once_encode_once(
    tokenizer: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, encode = [], Template.encode

    def counted(self: Template, *args: Any, **options: Any) -> Example:
        encoded.append(options["row"].id)
        return encode(self, *args, **options)

    monkeypatch.setattr(Template, "encode", counted)
    domains = [table(tmp_path / "d") for _ in range(2)]
    for domain in domains:
        domain.fingerprint()
    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(lambda domain: trained(domain, tokenizer), domains)]
    assert found[0] == found[1]
    assert len(encoded) == 30


def test_files_that_nobody_used_for_long_go(tokenizer: Any, cache: Path, tmp_path: Path) -> None:
    trained(table(tmp_path / "d"), tokenizer)
    (old,) = cache.glob("*.safetensors")
    month = time.time() - 40 * 86_400
    os.utime(old, (month, month))
    trained(table(tmp_path / "d"), tokenizer)
    assert time.time() - old.stat().st_mtime < 60, "a file that is read is used"
    os.utime(old, (month, month))
    trained(table(tmp_path / "e", rows=9), tokenizer)
    assert not old.exists()
