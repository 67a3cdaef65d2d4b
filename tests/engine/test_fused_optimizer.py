"""torch's fused kernels: the same steps, and only where the user left the choice open."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from residency.engine.fused_optimizer import fuse


def trained(make: Callable[..., Optimizer], *, fused: bool) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=draw).requires_grad_() for shape in ((3, 4), (5,), ())]
    optimizer = make(leaves)
    if fused:
        assert fuse(optimizer) is optimizer
        assert all(group["fused"] for group in optimizer.param_groups)
    for step in range(5):
        optimizer.zero_grad()
        sum((leaf - step).pow(4).sum() for leaf in leaves).backward()  # type: ignore[union-attr]
        optimizer.step()
    return [leaf.detach() for leaf in leaves]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(AdamW, {"weight_decay": 0.1}), (Adam, {}), (SGD, {"momentum": 0.9}), (AdamW, {"amsgrad": True})],
)
def test_the_same_steps(kind: Any, options: dict[str, Any]) -> None:
    plain, fused = (trained(lambda p: kind(p, lr=1e-3, **options), fused=flag) for flag in (False, True))
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_a_choice_of_the_user_stands() -> None:
    leaf = torch.zeros(3, requires_grad=True)
    for options in ({"foreach": True}, {"foreach": False}, {"fused": False}, {"capturable": True}):
        optimizer = AdamW([leaf], lr=1e-3, **options)  # type: ignore[arg-type]
        assert not fuse(optimizer).defaults["fused"], options
    assert "fused" not in fuse(RMSprop([leaf], lr=1e-3)).defaults
    assert not fuse(AdamW([torch.zeros(3, device="meta", requires_grad=True)])).defaults["fused"]


def test_the_state_can_be_stored_and_restored() -> None:
    leaf = torch.zeros(3, requires_grad=True)
    optimizer = fuse(AdamW([leaf], lr=1e-3))
    leaf.grad = torch.ones(3)
    optimizer.step()
    other = fuse(AdamW([leaf.detach().clone().requires_grad_()], lr=1e-3))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (twin,) = other.param_groups[0]["params"]
    for o, p in ((optimizer, leaf), (other, twin)):
        p.grad = torch.full((3,), 2.0)
        o.step()
    assert torch.equal(twin, leaf)
