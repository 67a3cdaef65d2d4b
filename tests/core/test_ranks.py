"""What ranks tell each other, on three real processes: facts, trees, sums and means of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from residency.core.ranks import from_first, gather_facts, rank, ranks, spread, together, tree_from_first
from support import rank_functions
from support.rank_runs import Group, group

TREE = {
    "weights": {"a": torch.randn(3, 2), "half": torch.randn(4).bfloat16(), "empty": torch.zeros(0, 2)},
    "facts": [1, 2.5, None, ("x", torch.tensor(3))],
    "flags": torch.tensor([True, False]),
}


@pytest.fixture(scope="module")
def three() -> Iterator[Group]:
    with group(3) as found:
        yield found


def _values(group: Group, function: Any, **arguments: Any) -> list[Any]:
    found = group.call(function, **arguments)
    assert [error for _, error in found] == [""] * group.ranks
    return [value for value, _ in found]


def test_facts_arrive_in_order(three: Group) -> None:
    gathered = [{"rank": r, "x": 0.1 * r} for r in range(3)]
    assert _values(three, rank_functions.facts) == [[gathered, "first", 3]] * 3


def test_what_is_no_number_arrives(three: Group) -> None:
    for inf, nan, _ in _values(three, rank_functions.nan):
        assert inf == math.inf
        assert math.isnan(nan)


def test_a_tree_arrives_bit_for_bit(three: Group) -> None:
    for found in _values(three, rank_functions.tree, tree=TREE):
        assert found["facts"][:3] == [1, 2.5, None]
        assert found["facts"][3][0] == "x"
        for name, tensor in TREE["weights"].items():  # type: ignore[attr-defined]
            assert found["weights"][name].dtype == tensor.dtype
            assert torch.equal(found["weights"][name], tensor)
        assert torch.equal(found["flags"], torch.tensor([True, False]))


def test_gradients_are_averaged_and_one_that_is_missing_counts_as_zero(three: Group) -> None:
    assert _values(three, rank_functions.gradients) == [[[2.0, 4.0], [1.0, 0.0], None]] * 3


def test_half_precision_is_summed_in_single(three: Group) -> None:
    """256 + 1 + 1 in bfloat16 is 256 or 260; the mean of the exact sum is 86."""
    assert _values(three, rank_functions.half) == [[86.0]] * 3


def test_sums_and_counts_are_reduced_apart(three: Group) -> None:
    """A mean of the ranks' means would be (5.5 + 2 + 3) / 3 = 3.5; outside of `together` nothing is split."""
    spread_out = [[1.0, 0], [2.0, 1], [3.0, 2], [10.0, 0]]
    assert _values(three, rank_functions.share) == [[[0, 1, 2, 3, 4], 1.0, 4.0, spread_out, []]] * 3


def test_in_lockstep_all_ranks_make_as_many_passes(three: Group) -> None:
    """Four items on three ranks: whoever has no second one repeats the last, and nobody listens."""
    found = _values(three, rank_functions.in_lockstep)
    assert [passes for passes, *_ in found] == [[1.0, 10.0], [2.0, 10.0], [3.0, 10.0]]
    assert [mean for _, mean, *_ in found] == [4.0] * 3
    assert [spread_out for *_, spread_out, _ in found] == [[[1.0, 0], [2.0, 1], [3.0, 2], [10.0, 0]]] * 3
    assert [alike for *_, alike in found] == [[[item, r] for item in rank_functions.UNEVEN] for r in range(3)]


def test_a_tensor_is_cut_as_torch_cuts_it(three: Group) -> None:
    """By its first dimension, the last ranks with less or nothing."""
    assert _values(three, rank_functions.cut) == [
        [[2, 2], [2], [1, 3], [1, 2]],
        [[2, 2], [2], [0, 3], [1, 2]],
        [[1, 2], [0], [0, 3], [0, 2]],
    ]


def test_one_process_is_a_rank_of_its_own() -> None:
    assert (rank(), ranks(), gather_facts(3), from_first(4)) == (0, 1, [3], 4)
    with together():
        assert spread(lambda x: 2 * x, [1, 2]) == [2, 4]
    assert tree_from_first(TREE) is TREE
