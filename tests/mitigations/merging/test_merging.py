"""What merging mitigations share: sums that stay products, what is remembered, and what a study may share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from residency.adapters.algebra.low_rank import low_rank_factors, product_factors
from residency.core.tensors import Products, Term, terms_of, weighted_sum
from residency.core.types import Tensors
from residency.mitigations import (
    DARE,
    EMA,
    SLERP,
    TIES,
    EarlyStopping,
    FisherMerge,
    IntruderReduction,
    MagMax,
    Mitigation,
    Soup,
    TaskArithmetic,
    WiseFT,
)
from residency.mitigations.merging.slerp import slerp_merge
from residency.mitigations.merging.states import kept_states, merged, merged_vectors, remember
from residency.mitigations.merging.task_arithmetic import task_arithmetic
from residency.mitigations.merging.weight_mixing import mix
from residency.runs.code_identity import closure
from support.two_stages import equal, randn, two_stages
from table import MITIGATIONS

# -- sums of products -----------------------------------------------------------------------------------------------


def product(seed: int, *, scale: float = 1.5, rank: int = 2) -> Products:
    """One tensor `p` (9, 7) that is known by its factors, one `d` that is not, and an integer one."""
    left, right = randn(9, rank, seed=seed), randn(rank, 7, seed=seed + 50)
    whole = {"p": scale * left @ right, "d": randn(4, seed=seed), "n": torch.tensor([seed])}
    factors: dict[str, list[Term]] = {"p": [(scale, left, right)]}
    return Products(whole, whole.__getitem__, factors.get)


def whole(terms: list[Term]) -> torch.Tensor:
    return torch.stack([c * left @ right for c, left, right in terms]).sum(0)


LINEAR: dict[str, Callable[[Tensors, Tensors, Tensors], Tensors]] = {
    "mix": lambda base, one, two: mix(one, two, alpha=0.3),
    "weighted_sum": lambda base, one, two: weighted_sum([(0.5, base), (2.0, one), (-1.0, two)]),
    "task_arithmetic": lambda base, one, two: task_arithmetic(base, [one, two], strength=0.7),
    "slerp": lambda base, one, two: slerp_merge(base, one, two, alpha=0.4),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_mixture_of_products_is_their_product(name: str) -> None:
    mixed = LINEAR[name](product(1), product(2), product(3))
    terms = terms_of(mixed, "p")
    assert terms is not None
    torch.testing.assert_close(whole(list(terms)), mixed["p"], rtol=0, atol=1e-5)
    assert terms_of(mixed, "d") is None
    plain = {key: product(2)[key] for key in product(2)}
    assert terms_of(LINEAR[name](product(1), plain, product(3)), "p") is None, "one part is not known by factors"


@pytest.mark.parametrize("name", LINEAR)
def test_integer_tensors_are_not_mixed(name: str) -> None:
    assert LINEAR[name](product(1), product(2), product(3))["n"].tolist() == [3]


def test_integer_tensors_are_not_merged() -> None:
    base, one, two = product(1), product(2), product(3)
    found = merged_vectors(base, [one, two], lambda name, vectors: vectors[0], strength=1.0)
    assert found["n"].tolist() == [3]
    assert found["n"].dtype == torch.long
    torch.testing.assert_close(found["d"], one["d"])
    assert merged(one, lambda name: 0 * one[name])["n"].tolist() == [2]


def test_merging_reads_one_name_at_a_time() -> None:
    read: list[str] = []

    def compute(name: str) -> torch.Tensor:
        read.append(name)
        return torch.ones(2)

    lazy = Products(["a", "b"], compute, lambda name: None)
    sums = [weighted_sum([(0.5, lazy), (0.5, lazy)]), merged_vectors(lazy, [lazy], lambda n, v: v[0], strength=1.0)]
    assert not read
    assert all(found["b"].tolist() == [1.0, 1.0] for found in sums)
    assert {*read} == {"b"}


@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (5, 4)])
def test_the_factors_of_a_sum_of_products_are_the_best_ones(rows: int, columns: int) -> None:
    """As good as those of the dense sum (Eckart and Young), in the same gauge, also if the rank exceeds the matrix."""
    terms = [(c, randn(rows, 3, seed=i), randn(3, columns, seed=i + 9)) for i, c in enumerate((0.5, -2.0, 1.0))]
    dense = whole(list(terms))
    for rank in (2, 3, 6):
        found = product_factors(terms, rank=rank, a_norm=2.0)
        assert found is not None
        b, a, lost, total = found
        assert (b.shape, a.shape) == ((rows, rank), (rank, columns))
        optimum = float(torch.linalg.svdvals(dense.double())[rank:].norm())
        assert float((b @ a - dense).norm()) == pytest.approx(optimum, rel=1e-4, abs=1e-4)
        assert lost**0.5 == pytest.approx(optimum, rel=1e-3, abs=1e-3)
        assert total == pytest.approx(float(dense.square().sum()), rel=1e-4)
        assert float(a.norm()) == pytest.approx(2.0, rel=1e-5)
        dense_b, dense_a = low_rank_factors(dense, rank=rank, a_norm=2.0)
        torch.testing.assert_close(b @ a, dense_b @ dense_a, rtol=0, atol=1e-4)


def test_one_product_is_taken_as_it_is() -> None:
    left, right = randn(6, 2), randn(2, 5)
    nothing = (1.0, torch.zeros(6, 2), randn(2, 5, seed=4))
    found = product_factors([nothing, (0.5, left, right)], rank=2, a_norm=9.0)
    assert found is not None
    assert torch.equal(found[0], 0.5 * left)
    assert torch.equal(found[1], right)
    assert found[2] == 0.0
    assert product_factors([nothing], rank=2, a_norm=1.0) is None


# -- what is remembered ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("last", "wanted"), [(None, [0, 1, 2, 3]), (1, []), (2, [3]), (3, [2, 3]), (9, [0, 1, 2, 3])])
def test_the_newest_states_are_remembered(last: int | None, wanted: list[int]) -> None:
    kept: dict[str, torch.Tensor] = {}
    live = {"w/x": torch.zeros(1), "v": torch.zeros(2)}
    for index in range(4):
        live["w/x"].fill_(index)
        kept = remember(kept, live, index=index, last=last)
    assert [int(state["w/x"]) for state in kept_states(kept)] == wanted
    assert all({*state} == {*live} for state in kept_states(kept))


# -- what a study may share -----------------------------------------------------------------------------------------

AFTERWARDS = [WiseFT, TaskArithmetic, TIES, DARE, SLERP, FisherMerge, IntruderReduction, Soup, MagMax]
MINE = [
    "wise_ft",
    "ema",
    "soup",
    "task_arithmetic",
    "ties",
    "dare",
    "slerp",
    "fisher_merge",
    "intruder_reduction",
    "magmax",
]


@pytest.mark.parametrize("kind", AFTERWARDS)
def test_what_follows_training_shares_it(kind: type[Mitigation]) -> None:
    assert not any(kind().touches_training(index) for index in range(3))
    assert kind().changes_weights(1)


@pytest.mark.parametrize("make", [EMA, EarlyStopping, partial(Soup, over="steps")])
def test_what_watches_the_steps_is_part_of_training(make: Callable[[], Mitigation]) -> None:
    assert make().touches_training(0)


@pytest.mark.parametrize("name", [*MINE, "early_stopping"])
def test_off_shares_everything(name: str) -> None:
    off = MITIGATIONS[name].off()
    assert not any(off.touches_training(index) or off.changes_weights(index) for index in range(3))
    assert not off.uses_base
    assert not off.uses_validation


def test_the_key_knows_the_files_that_a_mitigation_is_written_with() -> None:
    reached = {c: closure([c.__module__], followed=frozenset({"residency"})) for c in (FisherMerge, TIES)}
    assert {f"residency.mitigations.penalties.{name}" for name in ("fisher", "quadratic")} <= reached[FisherMerge]
    assert "residency.mitigations.merging.states" in reached[TIES]
    assert "residency.mitigations.penalties.fisher" not in reached[TIES]


# -- resume ---------------------------------------------------------------------------------------------------------

RESUMED: dict[str, Callable[[], Mitigation]] = {
    "wise_ft": lambda: WiseFT(alpha=0.6, into="train"),
    "ties": lambda: TIES(density=0.5),
    "dare": DARE,
    "magmax": MagMax,
    "ema": lambda: EMA(decay=0.8),
    "soup": lambda: Soup(over="steps", last=3, choose="greedy"),
    "early_stopping": lambda: EarlyStopping(every=1, min_delta=100.0, patience=2),
    "fisher_merge": lambda: FisherMerge(fisher_samples=5),
}


# Means of steps, patience, and information are kept over a stop; what is mixed behind a stage comes with the pairs.
KEPT = ("soup", "early_stopping", "fisher_merge")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in KEPT else pytest.mark.pairs) for n in RESUMED])
def test_a_stopped_run_goes_on_bit_for_bit(name: str, llama: Path) -> None:
    """Stopped where patience has run out too: nothing more is trained then."""
    whole, again = (two_stages(llama, "lora", RESUMED[name], stop=at) for at in (None, (1, 3)))
    assert again.record["scores"] == whole.record["scores"]
    for one, other in zip(whole.weights, again.weights, strict=True):
        assert equal(one, other)
    states = [run.tree(2)["mitigations"]["x"] for run in (whole, again)]
    assert {*states[0]} == {*states[1]}
    for key, value in states[0].items():
        pairs = value.items() if isinstance(value, dict) else [(key, value)]
        other = states[1][key] if isinstance(value, dict) else states[1]
        assert all(torch.equal(tensor, other[at]) for at, tensor in pairs)
