"""Which examples a memory keeps, and which of them it gives back. Pure functions.

A fair memory is a ranking and a quota: every domain keeps the first of its examples in an order of its own, and as
many as every other domain. A memory that has to shrink for a new domain cuts the ends of its rankings off.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from residency.core.randomness import choice, permutation, seed_of

__all__ = ["cumulative", "drawn", "fair_quotas", "herding_order", "kmeans_order", "reservoir_slot"]


def reservoir_slot(n: int, capacity: int, *, seed: int) -> int | None:
    """Where the n-th item ever seen (from 0) goes in a reservoir of `capacity` slots.

    Returns:
        A slot, or `None` if the item is not kept. After n items each is in the reservoir with probability
        min(1, capacity / n) (algorithm R, Vitter 1985).
    """
    if n < capacity:
        return n
    slot = choice(n + 1, seed, "reservoir", n)
    return slot if slot < capacity else None


def fair_quotas(counts: Sequence[int], capacity: int) -> list[int]:
    """How many of its examples each domain may keep: as equal as their numbers permit.

    Args:
        counts: Examples there are of each domain, oldest domain first.
        capacity: Examples that may be kept together.

    Returns:
        Quotas <= counts with sum min(capacity, Σ counts). Two domains that have enough differ by at most 1, of equal
        ones the older having more; what a small domain leaves over goes to the others.
    """
    quotas, left = [0] * len(counts), capacity
    # Smallest first: what it does not need is for the rest. Of equals the newest, so that the oldest gets the odd one.
    order = sorted(range(len(counts)), key=lambda i: (counts[i], -i))
    for done, i in enumerate(order):
        quotas[i] = min(counts[i], left // (len(order) - done))
        left -= quotas[i]
    return quotas


def herding_order(features: Tensor, count: int) -> list[int]:
    """Greedy matching of the mean (Welling 2009; Rebuffi et al. 2017, algorithm 4).

        p_k = argmin_x ‖ μ - (φ(x) + Σ_{j<k} φ(p_j)) / k ‖,   without repetition

    Args:
        features: φ, (n, D).
        count: How many to rank, at most n.

    Returns:
        Row numbers, best first; any first part of them is the herding selection of that size. Of equals the first row.
    """
    phi = features.double()
    mean, total = phi.mean(0), torch.zeros_like(phi[0])
    squares = phi.square().sum(1)
    order: list[int] = []
    for k in range(1, count + 1):
        # ‖kμ - S - φ‖² up to what is the same for every φ.
        distance = squares - 2 * phi @ (k * mean - total)
        distance[order] = torch.inf
        order.append(int(distance.argmin()))
        total = total + phi[order[-1]]
    return order


def kmeans_order(features: Tensor, count: int, *, seed: int) -> list[int]:
    """One example per cluster, the one next to its centre (IDBR, Huang et al. 2021).

    Args:
        features: (n, D).
        count: Clusters, and examples to rank, at most n.
        seed: Of the first centres (distinct rows) and of what fills the places of empty clusters.

    Returns:
        Row numbers: representatives of large clusters first, then rows drawn from the rest where clusters were empty.
    """
    # Loaded when it is needed: importing it would slow every command down.
    from scipy.cluster.vq import kmeans2

    points = features.double().numpy()
    shuffled = permutation(len(points), seed, "kmeans")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty cluster has no representative; its place is filled below
        centres, label = kmeans2(points, points[list(shuffled[:count])], minit="matrix", iter=20)
    found: dict[int, int] = {}
    size = np.bincount(label, minlength=count)
    distance = np.linalg.norm(points - centres[label], axis=1)
    for row in np.argsort(distance, kind="stable").tolist():
        found.setdefault(int(label[row]), row)
    ranked = [found[cluster] for cluster in sorted(found, key=lambda cluster: (-size[cluster], found[cluster]))]
    chosen = {*ranked}
    return [*ranked, *(row for row in shuffled if row not in chosen)][:count]


def cumulative(losses: Sequence[float], *, exponent: float) -> list[float]:
    """Running sums of loss^a, for `drawn`; all ones if they vanish."""
    weights = [max(loss, 0.0) ** exponent for loss in losses]
    return list(accumulate(weights if sum(weights) > 0 else [1.0] * len(losses)))


def drawn(sums: Sequence[float], seed: int, *words: str | int) -> int:
    """A draw with p_i ∝ w_i from running sums of w; a function of (seed, words)."""
    return min(bisect_right(sums, seed_of(seed, *words) / 2**63 * sums[-1]), len(sums) - 1)
