"""What the processes of a group run in the tests of `core.ranks`; a process imports them by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from residency.core.ranks import (
    from_first,
    gather_facts,
    mean_gradients,
    own_share,
    rank,
    ranks,
    spread,
    sum_over_ranks,
    together,
    tree_from_first,
)

UNEVEN = [1.0, 2.0, 3.0, 10.0]


def facts() -> list[Any]:
    return [gather_facts({"rank": rank(), "x": 0.1 * rank()}), from_first("first" if rank() == 0 else "other"), ranks()]


def nan() -> list[float]:
    return list(gather_facts(math.nan if rank() == 1 else math.inf))


def tree(tree: Any) -> Any:
    return tree_from_first(tree if rank() == 0 else None)


def gradients() -> list[Any]:
    leaves = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    leaves[0].grad = torch.tensor([1.0, 2.0]) * (rank() + 1)
    if rank() == 1:
        leaves[1].grad = torch.tensor([3.0, 0.0])
    mean_gradients(leaves)
    return [None if leaf.grad is None else leaf.grad.tolist() for leaf in leaves]


def half() -> list[float]:
    leaf = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    leaf.grad = torch.tensor([1.0 if rank() else 256.0], dtype=torch.bfloat16)
    mean_gradients([leaf])
    assert leaf.grad is not None
    return leaf.grad.tolist()  # type: ignore[no-any-return]


def share() -> list[Any]:
    alone = [list(own_share(range(5))), float(sum_over_ranks(torch.tensor(1.0)))]
    with together():
        own = list(own_share(UNEVEN))
        total, count = sum_over_ranks(torch.tensor(sum(own))), sum_over_ranks(torch.tensor(len(own)))
        return [*alone, float(total / count), spread(lambda x: [x, rank()], UNEVEN), spread(lambda x: x, [])]
