"""Children of a domain: how many, of whom, with which provenance, and which are dropped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.core.errors import UserError
from residency.core.types import Row
from residency.domains.augmentation.base import PROVENANCE, Asked, Attempt, Augmentation, Material
from residency.domains.augmentation.children import plan, shares
from residency.domains.controlled import Controlled
from residency.domains.joint import Joint
from residency.domains.stream_data import StreamData
from residency.domains.table import Table

# Fifteen words, so that a changed one leaves a near-duplicate.
LONG = "the committee met on a rainy day in the old town hall and spoke about number"


class Suffix(Augmentation):
    """The prompt with a word behind it."""

    name: ClassVar[str] = "suffix"

    def __init__(self, *, words: Sequence[str] = ("again",), dropped: Sequence[str] = (), **options: Any) -> None:
        super().__init__(**options)
        self.words, self.dropped = words, dropped

    def attempts(self, asked: Sequence[Asked], material: Material) -> Iterator[Attempt]:
        for one in asked:
            prompt = f"{one.parent.prompt} {self.words[(one.number - 1) % len(self.words)]}"
            yield Attempt(prompt=prompt, dropped="listed" if one.parent.id in self.dropped else "", score=0.5)

    def identity(self) -> dict[str, Any]:
        return {"words": list(self.words)}


def written(folder: Path, split: str, prompts: Sequence[str]) -> str:
    path = folder / f"{split}.jsonl"
    rows = [{"id": f"{split}{i}", "prompt": p, "completion": str(i)} for i, p in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def table(
    folder: Path, *, test: Sequence[str] = ("what else",), validation: Sequence[str] = ("or this",), **options: Any
) -> Table:
    folder.mkdir(exist_ok=True)
    train = options.pop("train", [f"{LONG} {i}" for i in ("one", "seven", "forty", "ninety")])
    files = {"train": written(folder, "train", train), "test": written(folder, "test", test)}
    return Table(**files, validation=written(folder, "validation", validation), **options)


@given(st.integers(1, 500), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_children_are_at_most_their_share(rows: int, per_row: list[int], share: float) -> None:
    counts = shares(rows, per_row, share)
    assert all(0 <= count <= rows * number for count, number in zip(counts, per_row, strict=True))
    assert sum(counts) <= share * (sum(counts) + rows) + 1e-6
    # No more is left out than the share asks for, up to one per method.
    whole = sum(rows * number for number in per_row)
    assert sum(counts) == whole or sum(counts) + len(per_row) >= share / (1 - share) * rows - 1


@pytest.mark.parametrize(
    ("rows", "per_row", "share", "counts"),
    [
        (10, [1], 0.5, [10]),
        (10, [1], 0.2, [2]),
        (10, [1, 1], 0.5, [5, 5]),
        (9, [2, 1], 0.5, [6, 3]),
        (10, [1], 0.01, [0]),
    ],
)
def test_shares_by_hand(rows: int, per_row: list[int], share: float, counts: list[int]) -> None:
    assert shares(rows, per_row, share) == counts


def test_every_row_has_a_child_before_one_has_two() -> None:
    rows = [Row(id=str(i), prompt="p", completion="c") for i in range(3)]
    assert [(one.parent.id, one.number) for one in plan(rows, 5)] == [("0", 1), ("1", 1), ("2", 1), ("0", 2), ("1", 2)]


def test_a_child_says_where_it_comes_from(tmp_path: Path) -> None:
    plain, more = table(tmp_path / "a"), table(tmp_path / "a", augment=[Suffix(seed=3)])
    rows, given = more.rows("train"), plain.rows("train")
    assert rows[: len(given)] == given, "the rows of the file, as they are, come first"
    for parent, child in zip(given, rows[len(given) :], strict=True):
        assert (child.id, child.group) == (f"{parent.id}~suffix1", parent.id)
        assert (child.prompt, child.completion) == (f"{parent.prompt} again", parent.completion)
        assert child.extra[PROVENANCE] == {"method": "suffix", "parent": parent.id, "seed": 3, "score": 0.5}
    assert more.rows("test") == plain.rows("test")
    assert more.rows("validation") == plain.rows("validation")
    assert more.given["train"] == 8
    assert more.augmented[0]["kept"] == 4


def test_children_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    found = [table(tmp_path / "a", **more).fingerprint() for more in (
        {}, {"augment": [Suffix()]}, {"augment": [Suffix()]}, {"augment": [Suffix(seed=1)]},
        {"augment": [Suffix(words=("anew",))]}, {"augment": [Suffix()], "max_share": 0.2},
    )]  # fmt: skip
    assert found[1] == found[2]
    assert len({*found}) == 5


def test_rows_of_another_process_are_not_augmented_again(tmp_path: Path) -> None:
    first, second = (table(tmp_path / "a", augment=[Suffix()]) for _ in range(2))
    second.take_rows(json.loads(json.dumps(first.give_rows())))
    assert second.rows("train") == first.rows("train")
    assert second.fingerprint() == first.fingerprint()


@pytest.mark.parametrize("where", ["test", "validation", "probe", "domain that is not learned"])
def test_what_resembles_a_scored_row_is_dropped(tmp_path: Path, where: str) -> None:
    """Equal, or with one word of many changed; in whatever split of the stream that is scored."""
    scored = [f"{LONG} ONE again!", f"{LONG} seven more"]
    own = {where: scored} if where in ("test", "validation") else {}
    augmented = table(tmp_path / "a", augment=[Suffix()], train=[f"{LONG} one", f"{LONG} seven", "a b", "c d"], **own)
    other = table(tmp_path / "b", test=scored, train=["x y"]) if not own else table(tmp_path / "b", train=["x y"])
    domains, probes = {"a": augmented, "b": other}, dict[str, Table]()
    if where == "probe":
        probes["p"] = domains.pop("b")
    data = StreamData(domains={**domains}, probes={**probes}, order=["a"])
    assert {row.prompt for row in data.domains["a"].rows("train")[4:]} == {"a b again", "c d again"}
    assert data.augmented()["a"][0]["dropped"] == {"near_scored": 2}


def test_two_equal_children_are_one(tmp_path: Path) -> None:
    domain = table(tmp_path / "a", augment=[Suffix(per_row=2)], max_share=0.9)
    assert len(domain.rows("train")) == 8
    assert domain.augmented[0]["dropped"] == {"not_new": 4}
    assert domain.augmented[0]["asked"] == 8


def test_counts_add_up(tmp_path: Path) -> None:
    domain = table(tmp_path / "a", augment=[Suffix(dropped=["train0"]), Suffix(words=("b",))], max_share=0.6)
    with pytest.raises(UserError, match="~suffix1"):
        domain.rows("train")
    domain = table(tmp_path / "a", augment=[Suffix(dropped=["train0"], per_row=2)])
    domain.rows("train")
    (made,) = domain.augmented
    assert made["asked"] == made["kept"] + sum(made["dropped"].values()) == 4
    assert made["not_asked"] == 4
    assert made["dropped"] == {"listed": 1}


def test_less_than_a_tenth_is_refused(tmp_path: Path) -> None:
    train = [f"row {i}" for i in range(20)]
    dropped = [f"train{i}" for i in range(20)]
    assert len(table(tmp_path / "a", train=train, augment=[Suffix(dropped=dropped[:18])]).rows("train")) == 22
    with pytest.raises(UserError, match=r"1 rows that can be used of 20 \(5\.0%\)") as error:
        table(tmp_path / "a", train=train, augment=[Suffix(dropped=dropped[:19])]).rows("train")
    assert "listed 19" in str(error.value)


def test_conversations_have_no_children(tmp_path: Path) -> None:
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation", "test")}
    for split, path in files.items():
        turns = [{"role": "user", "content": split}, {"role": "assistant", "content": "b"}]
        path.write_text(json.dumps({"messages": turns}))
    with pytest.raises(UserError, match="kind messages"):
        Table(**{split: str(path) for split, path in files.items()}, augment=[Suffix()]).rows("train")


def test_a_probe_is_not_augmented(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.probes\.p has augment"):
        StreamData(domains={"c": Controlled(facts=4)}, probes={"p": table(tmp_path / "a", augment=[Suffix()])})


def test_parts_of_a_joint_domain_bring_their_children(tmp_path: Path) -> None:
    data = StreamData(domains={"all": Joint(domains={"a": table(tmp_path / "a", augment=[Suffix()])})})
    assert len(data.domains["all"].rows("train")) == 8
    assert data.augmented()["all"][0]["kept"] == 4


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_a_share_is_between_none_and_all(tmp_path: Path, share: float) -> None:
    with pytest.raises(UserError, match="max_share"):
        table(tmp_path / "a", max_share=share)
