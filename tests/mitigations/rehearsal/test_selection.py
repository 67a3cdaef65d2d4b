"""Quotas, rankings and draws: closed forms, and what must not depend on the order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from residency.mitigations.rehearsal.selection import cumulative, drawn, fair_quotas, herding_order, kmeans_order


def cloud(rows: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))


# --- quotas -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, database=None, max_examples=100)
@given(counts=st.lists(st.integers(0, 30), max_size=6), capacity=st.integers(1, 60))
def test_quotas_are_as_equal_as_they_can_be(counts: list[int], capacity: int) -> None:
    quotas = fair_quotas(counts, capacity)
    assert sum(quotas) == min(capacity, sum(counts))
    assert all(quota <= count for quota, count in zip(quotas, counts, strict=True))
    limited = [q for q, count in zip(quotas, counts, strict=True) if q == count]
    free = [q for q, count in zip(quotas, counts, strict=True) if q < count]
    if free:
        assert max(free) - min(free) <= 1
        assert quotas == sorted(quotas, reverse=True) or len({*counts}) > 1, "of equals the oldest has the odd one"
        assert max(limited, default=0) <= min(free) + 1, "nobody has more than those who could have had it"


# --- herding ----------------------------------------------------------------------------------------------------------


def test_herding_is_the_greedy_choice() -> None:
    """Against the definition, written out: every row tried, the distance of the mean measured."""
    phi = cloud(12).double()
    chosen: list[int] = []
    for _ in range(7):
        rest = [i for i in range(12) if i not in chosen]
        chosen.append(min(rest, key=lambda i: float((phi[[*chosen, i]].mean(0) - phi.mean(0)).norm())))
    assert herding_order(phi, 7) == chosen


def test_herding_does_not_depend_on_the_order_and_is_nested() -> None:
    phi = cloud(20)
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist()
    whole = herding_order(phi, 20)
    assert [shuffled[i] for i in herding_order(phi[shuffled], 20)] == whole
    assert sorted(whole) == list(range(20))
    assert herding_order(phi, 6) == whole[:6]


def test_herding_gets_nearer_to_the_mean_on_average() -> None:
    """The error of the running mean, over 40 clouds, never rises, and ends below that of as many random rows."""
    errors, random = torch.zeros(12), 0.0
    for seed in range(40):
        phi = cloud(60, seed=seed)
        order = herding_order(phi, 12)
        errors += torch.stack([(phi[order[: k + 1]].mean(0) - phi.mean(0)).norm() for k in range(12)])
        random += float((phi[:12].mean(0) - phi.mean(0)).norm())
    assert bool((errors.diff() <= 0).all())
    assert errors[-1] < 0.3 * random


# --- k-means ----------------------------------------------------------------------------------------------------------


def test_one_representative_per_cluster_the_largest_first() -> None:
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    sizes = [3, 9, 6]
    noise = torch.randn(18, 2, generator=torch.Generator().manual_seed(0))
    points = centres.repeat_interleave(torch.tensor(sizes), dim=0) + noise
    cluster = torch.tensor([0] * 3 + [1] * 9 + [2] * 6)
    # A seed whose first centres lie in all three: Lloyd's algorithm finds the nearest optimum, not the best.
    orders = [kmeans_order(points, 3, seed=seed) for seed in range(12)]
    good = [order for order in orders if len({*cluster[order].tolist()}) == 3]
    assert good
    for order in good:
        assert cluster[order].tolist() == [1, 2, 0]
        for row in order:
            own = points[cluster == cluster[row]]
            assert (points[row] - own.mean(0)).norm() == (own - own.mean(0)).norm(dim=1).min()


def test_clusters_are_seeded_and_always_enough() -> None:
    phi = cloud(30)
    assert kmeans_order(phi, 8, seed=0) == kmeans_order(phi, 8, seed=0)
    assert kmeans_order(phi, 8, seed=0) != kmeans_order(phi, 8, seed=1)
    assert sorted(kmeans_order(phi, 30, seed=0)) == list(range(30))
    same = torch.ones(10, 3)
    assert len({*kmeans_order(same, 6, seed=0)}) == 6, "clusters without a point are made up for"


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_draws_follow_the_losses(exponent: float) -> None:
    """Chi-square with 3 degrees of freedom; chance passes 31 once in a million."""
    losses, draws = [0.5, 1.0, 2.0, 4.0], 4000
    sums = cumulative(losses, exponent=exponent)
    counts = torch.zeros(4)
    for i in range(draws):
        counts[drawn(sums, 0, "test", i)] += 1
    expected = torch.tensor(losses) ** exponent
    expected = expected / expected.sum() * draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 31
    assert drawn(sums, 0, "test", 5) == drawn(sums, 0, "test", 5)


def test_losses_that_vanish_are_all_alike() -> None:
    sums = cumulative([0.0, 0.0, 0.0], exponent=1.0)
    assert {drawn(sums, 0, i) for i in range(60)} == {0, 1, 2}
    assert {drawn(cumulative([0.0, 1.0, 0.0], exponent=1.0), 0, i) for i in range(60)} == {1}
