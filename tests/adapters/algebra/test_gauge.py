"""The nearest gauge: the product is exact, and the factors stay where what remembers them left them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from residency.adapters.algebra.gauge import nearest_gauge
from residency.adapters.algebra.low_rank import product_factors
from residency.adapters.peft import lora
from residency.core.tensors import snapshot, weighted_sum
from residency.mitigations.penalties.quadratic import quadratic_penalty
from residency.testing.tiny_runs import make_module


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def of(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Some factors of a matrix."""
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


A3 = matrix([2, 1, 0], [0, 1, 0])


@pytest.mark.parametrize(
    ("start", "product", "a", "b"),
    [
        (
            matrix([3, 0, 0], [0, 1, 0]),
            matrix([3, 0, 0], [0, 1, 0]),
            matrix([3, 0, 0], [0, 1, 0]),
            matrix([1, 0], [0, 1]),
        ),
        (
            matrix([1, 0, 0], [0, 0, 1]),
            matrix([2, 0, 0], [0, 0.5, 0.5]),
            matrix([1, 0, 0], [0, 0.70711, 0.70711]),
            matrix([2, 0], [0, 0.70711]),
        ),
        (
            A3,
            matrix([2, 1, 0.5], [0, 1, 0.5], [2, 2, 1]),
            matrix([2.0351, 0.8286, 0.4143], [0.0365, 0.8938, 0.4469]),
            matrix([0.9790, 0.2112], [-0.0204, 1.1377], [0.9586, 1.3489]),
        ),
        (A3, matrix([1, 1, 0], [2, 2, 0], [3, 3, 0]), A3, matrix([0.5, 0.5], [1, 1], [1.5, 1.5])),
    ],
    ids=["unchanged", "45 degrees", "general", "rank 1 at r = 2"],
)
def test_by_hand(start: Tensor, product: Tensor, a: Tensor, b: Tensor) -> None:
    found_b, found_a = nearest_gauge(*of(product, 2), like=(torch.zeros_like(b), start))
    torch.testing.assert_close(found_a, a, rtol=0, atol=1e-4)
    torch.testing.assert_close(found_b, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [2.0, -3.0, 0.999999])
def test_a_multiple_keeps_a(scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    b, a = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((6, 3), (3, 8)))
    found_b, found_a = nearest_gauge(*of(scale * b @ a, 3), like=(b, a))
    torch.testing.assert_close(found_a, a, rtol=0, atol=1e-12)
    torch.testing.assert_close(found_b, scale * b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("alpha", "most"), [(0.999999, 1e-5), (0.9, 0.2), (0.5, 0.8)])
def test_factors_move_with_their_product(alpha: float, most: float) -> None:
    """The product is the best of its rank, A's Gram matrix stays, and a small step is a small step."""
    draw = torch.Generator().manual_seed(1)
    b, a = (torch.randn(*shape, generator=draw, dtype=torch.float64) / 8 for shape in ((48, 8), (8, 64)))
    near = tuple(t + 0.1 * torch.randn(t.shape, generator=draw, dtype=torch.float64) / 8 for t in (b, a))
    found = product_factors([(alpha, b, a), (1 - alpha, *near)], rank=8, a_norm=1.0)
    assert found is not None
    new_b, new_a = nearest_gauge(*found[:2], like=(b, a))
    torch.testing.assert_close(new_b @ new_a, (found[0] @ found[1]).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(new_a @ new_a.T, a @ a.T, rtol=0, atol=1e-9)
    moved = float((new_a - a).square().sum() + (new_b - b).square().sum()) ** 0.5
    assert moved < most


def test_a_mix_that_changes_nothing_leaves_a_penalty_alone(llama: Path) -> None:
    """Two equal states, mixed: EWC's penalty is 0 before and after. An SVD's gauge gave 0.89 for a step of 4e-7."""
    module = make_module(llama, lora(target_modules="all-linear", r=4), {})
    module.build(seed=0)
    leaves = module.adapter.trainable(module.model)
    torch.manual_seed(0)
    for leaf in leaves.values():
        torch.nn.init.normal_(leaf, std=0.1)
    anchor = snapshot(leaves)
    weights = module.adapter.weights(module.model, snapshot(module.adapter.state(module.model)))
    module.adapter.load_weights(module.model, weighted_sum([(0.999999, weights), (0.000001, weights)]))
    precision = {name: torch.ones_like(leaf) for name, leaf in leaves.items()}
    with torch.no_grad():
        assert float(quadratic_penalty(leaves, anchor, precision, strength=1.0)) < 1e-8
