"""The share of updates that half precision loses, against the spacing of its numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from residency.engine.lost_updates import lost_share


def spacing(values: torch.Tensor) -> torch.Tensor:
    """Distance of bfloat16 numbers around each: 8 bits of significand."""
    return 2.0 ** (values.abs().log2().floor() - 7)


@pytest.mark.parametrize("lr", [1e-5, 1e-4, 3e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_update_below_half_the_spacing_is_lost(optimizer: Any, lr: float) -> None:
    """The exact update comes from the same optimizer in float64; what it adds to is the bfloat16 parameter."""
    draw = torch.Generator().manual_seed(0)
    start = (0.02 * torch.randn(20_000, generator=draw)).bfloat16()
    gradient = torch.randn(20_000, generator=draw).bfloat16()
    steps = {}
    for dtype in (torch.bfloat16, torch.float64):
        leaf = torch.nn.Parameter(start.to(dtype, copy=True))
        leaf.grad = gradient.to(dtype)
        options = {"weight_decay": 0.0} if optimizer is torch.optim.AdamW else {}
        optimizer([leaf], lr=lr, **options).step()
        steps[dtype] = leaf.detach()
    exact = (steps[torch.float64] - start.double()).abs()
    expected = float((exact < 0.5 * spacing(start.double())).double().mean())
    found = lost_share({"w": start}, {"w": steps[torch.bfloat16]}, {"w": gradient})
    # Ties, powers of two (finer below) and the rounding inside of a bfloat16 step.
    assert found == pytest.approx(expected, abs=0.02)


def test_what_has_no_gradient_or_is_whole_does_not_count() -> None:
    half = torch.ones(4, dtype=torch.bfloat16)
    assert lost_share({"w": half}, {"w": half}, {"w": torch.tensor([1.0, 0.0, 0.0, 0.0])}) == 1.0
    assert lost_share({"w": half}, {"w": half}, {"w": torch.zeros(4)}) == 0.0
    assert lost_share({"w": half.float()}, {"w": half.float()}, {"w": torch.ones(4)}) == 0.0
