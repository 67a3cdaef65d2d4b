"""Properties of rows, splits and fingerprints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.core.errors import UserError
from residency.core.types import Row, Split
from residency.domains.base import Domain, Kind, Template, drop_ambiguous, hash_order, split_by_group

quick = settings(deadline=None, database=None, max_examples=60)


class Given(Domain):
    """A domain of rows given in the test."""

    kind: Kind = "label"
    source = "the test"
    licence = "CC0-1.0"
    attribution = "nobody"

    def __init__(self, *, rows: Mapping[Split, Sequence[Row]], **options: Any) -> None:
        super().__init__(**options)
        self.given = rows
        self.reads = 0

    def read(self) -> Mapping[Split, Sequence[Row]]:
        self.reads += 1
        return self.given


class GivenText(Given):
    kind = "generative"


def row(name: str, *, prompt: str = "", completion: str = "yes", group: str = "") -> Row:
    return Row(id=name, prompt=prompt or f"prompt {name}", completion=completion, group=group)


def some_rows() -> dict[Split, list[Row]]:
    return {
        "train": [row(f"t{n}", completion="ba"[n % 2]) for n in range(5)],
        "validation": [row("v0", completion="a")],
        "test": [row("e0", completion="c"), row("e1", completion="b")],
    }


# --- ambiguity and splits ---------------------------------------------------------------------------------------------

rows_of_few_words = st.lists(
    st.builds(
        row,
        st.uuids().map(str),
        prompt=st.sampled_from(["fever", "Fever ", "  cough", "cough", "pain"]),
        completion=st.sampled_from(["a", "b"]),
        group=st.sampled_from(["", "g", "h"]),
    ),
    max_size=12,
)


@quick
@given(rows_of_few_words)
def test_ambiguous_prompts_go_and_repeated_ones_stay_once(rows: list[Row]) -> None:
    def key(prompt: str) -> str:
        return prompt.strip().lower()

    kept = drop_ambiguous(rows)
    clear = {key(r.prompt) for r in rows if len({o.completion for o in rows if key(o.prompt) == key(r.prompt)}) == 1}
    assert [key(r.prompt) for r in kept] == list(dict.fromkeys(key(r.prompt) for r in rows if key(r.prompt) in clear))
    assert all(next(r for r in rows if key(r.prompt) == key(k.prompt)) is k for k in kept)
    assert drop_ambiguous(kept) == kept


many_rows = st.lists(
    st.builds(row, st.uuids().map(str), group=st.sampled_from(["", *"abcdefghijklmnopqrst"])), max_size=40
)


@quick
@given(many_rows, many_rows)
def test_splits_are_disjoint_by_group_and_never_move(old: list[Row], new: list[Row]) -> None:
    before, after = split_by_group(old), split_by_group([*new, *old])
    assert sorted(r.id for rows in before.values() for r in rows) == sorted(r.id for r in old)
    groups = {split: {r.group or r.id for r in rows} for split, rows in after.items()}
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["validation"]
    assert not groups["validation"] & groups["test"]
    for split, rows in before.items():
        known = {r.id for r in rows}
        assert [r.id for r in after[split] if r.id in known] == [r.id for r in rows]


def test_split_shares_and_salt() -> None:
    rows = [row(str(n)) for n in range(4000)]
    splits = split_by_group(rows, validation=0.2, test=0.3)
    assert len(splits["validation"]) == pytest.approx(800, abs=80)
    assert len(splits["test"]) == pytest.approx(1200, abs=90)
    assert split_by_group(rows, salt="other") != split_by_group(rows)
    assert {split: len(r) for split, r in split_by_group(rows, validation=0.0, test=0.0).items()} == {
        "train": 4000,
        "validation": 0,
        "test": 0,
    }
    with pytest.raises(ValueError, match="nothing to train on"):
        split_by_group(rows, validation=0.5, test=0.5)


def test_the_first_rows_are_a_fair_sample_of_a_sorted_source() -> None:
    rows = [row(f"{n:04}", completion="a" if n < 1000 else "b") for n in range(2000)]
    first = hash_order(rows)[:400]
    assert sum(r.completion == "a" for r in first) == pytest.approx(200, abs=40)
    assert hash_order(reversed(rows)) == hash_order(rows)


# --- domain -----------------------------------------------------------------------------------------------------------


def test_rows_are_read_once_and_limited() -> None:
    domain = Given(rows=some_rows(), max_train=3, max_validation=None, max_test=1)
    assert [r.id for r in domain.rows("train")] == ["t0", "t1", "t2"]
    assert [r.id for r in domain.rows("validation")] == ["v0"]
    assert [r.id for r in domain.rows("test")] == ["e0"]
    assert domain.reads == 1
    assert Given(rows=some_rows(), max_validation=0).rows("validation") == ()


def test_defaults_follow_the_kind() -> None:
    label, text = Given(rows=some_rows()), GivenText(rows=some_rows())
    assert [*label.scorers] == ["nll", "accuracy"]
    assert [*text.scorers] == ["nll", "exact_match", "rougeL"]
    assert [*Given(rows=some_rows(), scorers=["nll"]).scorers] == ["nll"]
    assert label.template == Template(max_prompt_tokens=96, max_tokens=128, too_long="truncate", tokenise="apart")
    assert label.labels() == ("a", "b", "c")
    assert text.labels() == ()


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        ({"train": []}, {}, "no train rows"),
        ({"test": []}, {}, "no test rows"),
        ({}, {"max_train": 0}, "max_train = 0"),
        ({"test": [row("x"), row("x", prompt="other")]}, {}, "'x'"),
        ({"test": [row("x", prompt=" PROMPT  t1 ")]}, {}, "share their prompt"),
        ({"train": [row("y", group="g")], "test": [row("x", group="g")]}, {}, "share their group"),
    ],
)
def test_data_that_cannot_be_scored_is_refused(change: dict[Split, Any], options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Given(rows=some_rows() | change, **options).rows("train")


def test_rows_that_are_refused_can_be_looked_at_and_stay_refused() -> None:
    leak = {"test": [row("x", prompt="prompt t1"), row("y")]}
    domain = Given(rows=some_rows() | leak, max_test=1)
    assert [r.id for r in domain.rows("test", checked=False)] == ["x"], "after the limit"
    assert {**domain.given} == {"train": 5, "validation": 1, "test": 2}
    for _ in range(2):
        with pytest.raises(UserError, match="share their prompt"):
            domain.rows("test")
    assert domain.reads == 1


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(UserError, match="max_test = -1"):
        Given(rows=some_rows(), max_test=-1)


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    expected = "ee91fcbf5a32852a914d0838c6c011f711f683bb0a2bf8d9057fc834a7529928"
    assert Given(rows=some_rows()).fingerprint() == expected
    assert Given(rows=some_rows(), max_train=5, scorers=["nll"], template=Template()).fingerprint() == expected


@quick
@given(st.data())
def test_the_fingerprint_sees_any_change(data: st.DataObject) -> None:
    rows = some_rows()
    before = Given(rows=some_rows()).fingerprint()
    split = data.draw(st.sampled_from(["train", "validation", "test"]))
    at = data.draw(st.integers(0, len(rows[split]) - 1))  # type: ignore[index]
    field = data.draw(st.sampled_from(["id", "prompt", "completion", "group"]))
    old = rows[split][at]  # type: ignore[index]
    rows[split][at] = replace(old, **{field: getattr(old, field) + data.draw(st.text(min_size=1, max_size=3))})  # type: ignore[index]
    assert Given(rows=rows).fingerprint() != before


def test_the_fingerprint_sees_order_split_kind_and_template() -> None:
    rows = some_rows()
    swapped = rows | {"train": rows["train"][::-1]}
    moved = rows | {"train": rows["train"][1:], "validation": [*rows["validation"], rows["train"][0]]}
    prints = [
        Given(rows=rows).fingerprint(),
        Given(rows=swapped).fingerprint(),
        Given(rows=moved).fingerprint(),
        Given(rows=rows, max_test=1).fingerprint(),
        GivenText(rows=rows).fingerprint(),
        *(
            Given(rows=rows, template=template).fingerprint()
            for template in (
                Template(prompt="{prompt}"),
                Template(completion="{completion}"),
                Template(max_prompt_tokens=95),
                Template(max_tokens=127),
            )
        ),
    ]
    assert len(set(prints)) == len(prints)
