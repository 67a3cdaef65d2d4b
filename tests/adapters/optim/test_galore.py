"""GaLore: closed forms on small matrices (spec G1 to G7), state as plain tensors, the layer-wise variant."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from residency.adapters.optim import GaLoreOptimizer, LayerwiseOptimizer
from residency.adapters.optim import galore as galore_module
from residency.adapters.optim.galore import lift, project, projector
from residency.core.tensor_files import load_tree, save_tree

SHAPES = [(7, 5), (5, 7), (6, 6)]


def leaves(seed: int = 0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64)) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for weight, gradient in zip(weights, gradients(step), strict=True):
            weight.grad = gradient
        optimizer.step()


def wrapped(weights: list[nn.Parameter], factory: Callable[[Any], Any], **options: Any) -> GaLoreOptimizer:
    return GaLoreOptimizer(projected=weights, plain=[], factory=factory, **{"gap": 3, "scale": 1.0, **options})


def test_projection_is_orthonormal_and_on_the_smaller_side() -> None:
    for gradient in gradients(0):
        m, n = gradient.shape
        p = projector(gradient, rank=3)
        assert p.shape == (3, min(m, n))  # G5 is about states; this is P itself
        torch.testing.assert_close(p @ p.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)  # G4
        low = project(gradient, p)
        assert low.shape == ((m, 3) if m >= n else (3, n))
        best = torch.linalg.svdvals(gradient)[:3].square().sum()
        torch.testing.assert_close(low.square().sum(), best, rtol=1e-5, atol=0)
        assert lift(low, p, gradient.shape).shape == gradient.shape


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_full_rank_sgd_is_sgd(momentum: float) -> None:
    """G1. One subspace only: moments are not rotated with it."""
    factory = partial(SGD, lr=0.1, momentum=momentum)
    ours, theirs = leaves(), leaves()
    run(wrapped(ours, factory, rank=99, gap=99), ours, range(8))
    run(factory(theirs), theirs, range(8))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def _signed_permutation(gradient: Tensor, *, rank: int) -> Tensor:
    size = min(gradient.shape)
    signs = torch.tensor([(-1.0) ** i for i in range(size)], dtype=gradient.dtype)
    return signs[:, None] * torch.eye(size, dtype=gradient.dtype).roll(1, 0)


def test_full_rank_adam_is_adam_in_a_permuted_basis_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """G2 with weight decay, and G3: Adam is element-wise, so a rotation changes it."""
    factory = partial(AdamW, lr=0.05, weight_decay=0.3)
    theirs = leaves()
    run(factory(theirs), theirs, range(8))
    rotated = leaves()
    run(wrapped(rotated, factory, rank=99), rotated, range(8))
    for a, b in zip(rotated, theirs, strict=True):
        assert (a - b).detach().norm() > 1e-2 * b.detach().norm()
    monkeypatch.setattr(galore_module, "projector", _signed_permutation)
    ours = leaves()
    run(wrapped(ours, factory, rank=99), ours, range(8))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_states_are_low_rank() -> None:
    """G5."""
    weights = leaves()
    optimizer = wrapped(weights, AdamW, rank=2)
    run(optimizer, weights, range(1))
    shapes = [tuple(entry["exp_avg"].shape) for entry in optimizer.state_dict()["state"].values()]
    assert shapes == [(7, 2), (2, 7), (6, 2)]


def test_refresh_at_multiples_of_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """G6."""
    seen: list[Tensor] = []
    monkeypatch.setattr(galore_module, "projector", lambda g, *, rank: seen.append(g) or projector(g, rank=rank))
    weights = leaves()
    run(wrapped(weights, SGD, rank=2, gap=3), weights, range(8))
    expected = [gradient for step in (0, 3, 6) for gradient in gradients(step)]
    assert len(seen) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_an_update_has_the_rank() -> None:
    """G7, weight decay apart, which acts on the whole matrix."""
    for decay in (0.0, 0.5):
        weights = leaves()
        optimizer = wrapped(weights, partial(AdamW, lr=0.1, weight_decay=decay), rank=2)
        run(optimizer, weights, range(2))
        before = [weight.detach().clone() for weight in weights]
        run(optimizer, weights, range(2, 3))
        for old, new in zip(before, weights, strict=True):
            assert torch.linalg.matrix_rank(new - old * (1 - 0.1 * decay), atol=1e-9) == 2
            assert decay == 0.0 or torch.linalg.matrix_rank(new - old, atol=1e-9) > 2


def test_scale_and_scheduler_reach_the_update() -> None:
    steps = {}
    for key, scale, lr in (("plain", 1.0, 0.1), ("scaled", 0.25, 0.1), ("scheduled", 1.0, 0.4)):
        weights = leaves()
        optimizer = wrapped(weights, partial(SGD, lr=0.4), rank=2, scale=scale)
        optimizer.param_groups[0]["lr"] = lr
        run(optimizer, weights, range(1))
        steps[key] = weights[0].detach() - leaves()[0].detach()
    torch.testing.assert_close(steps["scaled"], steps["plain"] * 0.25)
    torch.testing.assert_close(steps["scheduled"], steps["plain"] * 4)


def test_plain_parameters_and_missing_gradients() -> None:
    weights, twins = leaves(), leaves()
    factory = partial(AdamW, lr=0.1, weight_decay=0.2)
    optimizer = GaLoreOptimizer(projected=weights[:2], plain=weights[2:], factory=factory, rank=2, gap=3, scale=1.0)
    plain = factory(twins[2:])
    for step in range(3):
        weights[0].grad, weights[2].grad, twins[2].grad = gradients(step)[0], gradients(step)[2], gradients(step)[2]
        optimizer.step()
        plain.step()
    assert torch.equal(weights[2], twins[2]), "a plain parameter is stepped by the wrapped optimizer itself"
    assert torch.equal(weights[1], twins[1]), "no gradient, no step and no decay"
    assert not torch.equal(weights[0], twins[0])


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
@pytest.mark.parametrize("factory", [partial(SGD, lr=0.1, momentum=0.9), partial(AdamW, lr=0.1), partial(SGD, lr=0.1)])
def test_state_goes_through_a_file(factory: Callable[[Any], Any], stop: int, tmp_path: Path) -> None:
    """Stopped inside a subspace (1, 2), before (3) and after (4) its refresh: bit for bit the uninterrupted run."""
    straight = leaves()
    run(wrapped(straight, factory, rank=2), straight, range(6))
    first = leaves()
    optimizer = wrapped(first, factory, rank=2)
    run(optimizer, first, range(stop))
    save_tree(tmp_path / "ours.safetensors", {"optimizer": optimizer.state_dict()})
    torch.save(optimizer.state_dict(), tmp_path / "torch.pt")
    for stored in (
        load_tree(tmp_path / "ours.safetensors")["optimizer"],
        torch.load(tmp_path / "torch.pt", weights_only=True),
    ):
        second = [nn.Parameter(weight.detach().clone()) for weight in first]
        resumed = wrapped(second, factory, rank=2)
        resumed.load_state_dict(stored)
        run(resumed, second, range(stop, 6))
        assert all(torch.equal(a, b) for a, b in zip(second, straight, strict=True))


def _quadratic(weights: list[nn.Parameter]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = torch.stack([weight.square().sum() * (i + 1) for i, weight in enumerate(weights)]).sum()
        loss.backward()
        return loss

    return closure


def _layerwise(weights: list[nn.Parameter]) -> LayerwiseOptimizer:
    factory = partial(AdamW, lr=0.1, weight_decay=0.1)

    def make(parameter: Tensor) -> torch.optim.Optimizer:
        return factory([parameter]) if parameter is weights[2] else wrapped([parameter], factory, rank=2)  # type: ignore[list-item]

    return LayerwiseOptimizer(parameters=weights, make=make)


def test_layerwise_is_the_same_run_without_gradients(tmp_path: Path) -> None:
    together, apart = leaves(), leaves()
    factory = partial(AdamW, lr=0.1, weight_decay=0.1)
    one = GaLoreOptimizer(projected=together[:2], plain=together[2:], factory=factory, rank=2, gap=3, scale=1.0)
    many = _layerwise(apart)
    for step in range(6):
        if step == 4:  # across a file, with the subspace of step 3
            save_tree(tmp_path / "s.safetensors", {"optimizer": many.state_dict()})
            many.close()
            many = _layerwise(apart)
            many.load_state_dict(load_tree(tmp_path / "s.safetensors")["optimizer"])
        for optimizer in (one, many):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
        one.zero_grad()
        losses = one.step(_quadratic(together)), many.step(_quadratic(apart))
        assert torch.equal(*losses)
        assert all(weight.grad is None for weight in apart)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_layerwise_leaves_other_backward_passes_alone() -> None:
    weights = leaves()
    optimizer = _layerwise(weights)
    _quadratic(weights)()
    assert all(torch.equal(a, b) for a, b in zip(weights, leaves(), strict=True))
    assert all(weight.grad is not None for weight in weights)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()
    optimizer.close()
    assert not any(weight._post_accumulate_grad_hooks for weight in weights)
