"""Branches: what is supervised, in which order, and that a memory gives back what it was given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.core.batching import make_batch
from residency.core.types import Branch, Example, Row
from residency.domains.row_values import row_of, row_values
from residency.mitigations.rehearsal.memory import pack_examples, unpack_examples

TALK = Example(
    domain="d",
    row="r",
    prompt=(1, 2),
    branches=(Branch(tokens=(3, 4, 5, 6, 7), mask=(True, True, False, True, True)),),
)
PAIR = Example(
    domain="d",
    row="p",
    prompt=(1, 2),
    branches=(Branch(tokens=(3, 4, 9), role="chosen"), Branch(tokens=(3, 5, 9), role="rejected", weight=2.0)),
)


def test_only_supervised_tokens_are_targets_and_each_follows_the_token_before_it() -> None:
    for layout in ("packed", "padded"):
        batch = make_batch([TALK], layout=layout)
        assert batch.targets.tolist() == [3, 4, 6, 7]
        assert batch.input_ids.flatten()[batch.target_at].tolist() == [2, 3, 5, 6]
        assert batch.input_ids.flatten().tolist() == [1, 2, 3, 4, 5, 6]


def test_a_pair_reads_its_prompt_and_what_both_begin_with_once() -> None:
    batch = make_batch([PAIR], layout="packed")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.targets.tolist() == [3, 4, 9, 3, 5, 9]
    assert batch.target_branch.tolist() == [0, 0, 0, 1, 1, 1]
    weights = batch.target_weights
    assert weights is not None
    assert weights.tolist() == [1, 1, 1, 2, 2, 2]
    assert make_batch([TALK], layout="packed").target_weights is None


def test_the_last_turn_asks_for_the_last_answer() -> None:
    last = TALK.last_turn()
    assert last.prompt == (1, 2, 3, 4, 5)
    assert last.branches == (Branch(tokens=(6, 7)),)
    assert TALK.targets == 4
    assert TALK.has_turns
    assert last.last_turn() is last
    single = Example.of(domain="d", row="r", prompt=(1,), completion=(2, 3))
    assert single.last_turn() is single


def test_a_mask_of_another_length_is_refused_and_a_full_one_is_none() -> None:
    with pytest.raises(ValueError, match="2 entries of a mask for 1 tokens"):
        Branch(tokens=(1,), mask=(True, False))
    assert Branch(tokens=(1, 2), mask=(True, True)) == Branch(tokens=(1, 2))


BRANCHES = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6).map(
    lambda pairs: Branch(tokens=tuple(t for t, _ in pairs), mask=tuple(on for _, on in pairs), weight=0.5)
)


@settings(deadline=None, database=None, max_examples=50)
@given(st.lists(BRANCHES, min_size=1, max_size=3), st.booleans())
def test_a_memory_gives_back_branches_as_they_were(branches: list[Branch], pair: bool) -> None:
    kept = PAIR if pair else Example(domain="d", row="x", prompt=(4,), branches=tuple(branches))
    assert unpack_examples(pack_examples([TALK, kept, TALK])) == [TALK, kept, TALK]


def test_a_memory_of_plain_completions_is_as_small_as_before() -> None:
    plain = Example.of(domain="d", row="r", prompt=(1,), completion=(2, 3), alternatives=[(4,)])
    packed = pack_examples([plain])
    assert bytes(packed["origin"].tolist()) == b'[["d", "r"]]'
    assert torch.equal(packed["lengths"], torch.tensor([[1, 2]], dtype=torch.int32))


def test_rows_of_every_kind_survive_json() -> None:
    import json

    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    rows = [
        Row(id="1", prompt="a", completion="b"),
        Row(id="2", prompt="a", completion="b", kind="messages", messages=turns, weight=2.0),
        Row(id="3", prompt="a", completion="b", kind="pair", rejected="c", references=("d", "e")),
        Row(id="4", prompt="a", completion="b", kind="unpaired", wanted=False, extra={"answer": 4}),
    ]
    assert [row_of(json.loads(json.dumps(row_values(row)))) for row in rows] == rows
