"""Quadratic pulls: value, gradient, and the sum of several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from residency.mitigations.penalties.quadratic import add_pulls, add_quadratics, quadratic_penalty, quadratic_pull

Named = dict[str, Tensor]
SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 4), "b": (5,), "c": ()}


def random_tensors(seed: int, *, dtype: torch.dtype = torch.float64) -> Named:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw, dtype=dtype) for name, shape in SHAPES.items()}


def random_precision(seed: int) -> Named:
    """Not negative, and 0 in places."""
    return {name: t.clamp_min(0) for name, t in random_tensors(seed).items()}


def square(precision: Named, parameters: Named, anchor: Named) -> Tensor:
    """Σ P (θ - θ*)², written out."""
    return torch.stack([(precision[n] * (parameters[n] - anchor[n]) ** 2).sum() for n in precision]).sum()


# --- the penalty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 3000.0])
def test_penalty_and_its_gradient(strength: float) -> None:
    """λ/2 Σ F (θ - θ*)²; the pull is λ F (θ - θ*), which is what autograd makes of the penalty."""
    theta, anchor, precision = random_tensors(0), random_tensors(1), random_precision(2)
    for leaf in theta.values():
        leaf.requires_grad_()
    penalty = quadratic_penalty(theta, anchor, precision, strength=strength)
    torch.testing.assert_close(penalty, strength / 2 * square(precision, theta, anchor), rtol=1e-12, atol=0)
    derived = torch.autograd.grad(penalty, list(theta.values()))
    pulls = quadratic_pull(theta, anchor, precision, strength=strength)
    for (name, leaf), gradient in zip(theta.items(), derived, strict=True):
        wanted = strength * precision[name] * (leaf - anchor[name])
        torch.testing.assert_close(pulls[name], wanted.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(pulls[name], gradient, rtol=1e-6, atol=0)


def test_no_penalty_at_the_anchor() -> None:
    theta, precision = random_tensors(0), random_precision(1)
    assert quadratic_penalty(theta, dict(theta), precision, strength=1e6) == 0
    assert not any(pull.any() for pull in quadratic_pull(theta, dict(theta), precision, strength=1e6).values())


def test_gradients_in_half_precision_keep_their_type() -> None:
    theta = random_tensors(0, dtype=torch.bfloat16)
    anchor = {name: t + 0.5 for name, t in theta.items()}
    precision = {name: torch.ones(t.shape) for name, t in theta.items()}
    pulls = quadratic_pull(theta, anchor, precision, strength=2.0)
    added = add_pulls({name: torch.ones_like(t) for name, t in theta.items()}, pulls)
    for name, t in theta.items():
        assert added[name].dtype == torch.bfloat16
        torch.testing.assert_close(added[name], 1 + 2 * (t - anchor[name]))


def test_pulls_are_added_to_copies_and_reach_what_has_no_gradient() -> None:
    gradients, pulls = random_tensors(0), random_tensors(1)
    other = {"d": torch.ones(2, dtype=torch.float64)}
    missing = {name: t for name, t in gradients.items() if name != "a"} | other
    before = {name: t.clone() for name, t in missing.items()}
    added = add_pulls(missing, pulls)
    assert {*added} == {"a", "b", "c", "d"}
    assert torch.equal(added["a"], pulls["a"])
    assert torch.equal(added["b"], before["b"] + pulls["b"])
    assert torch.equal(added["d"], other["d"])
    assert all(torch.equal(missing[name], t) for name, t in before.items())


def test_groups_do_not_disturb_each_other() -> None:
    """A group whose F is a million times larger leaves the pull on the others as it is: nothing is normalised."""
    theta, anchor, precision = random_tensors(0), random_tensors(1), random_precision(2)
    large = precision | {"a": 1e6 * precision["a"]}
    pulls = [quadratic_pull(theta, anchor, p, strength=1.0) for p in (precision, large)]
    assert torch.equal(pulls[0]["b"], pulls[1]["b"])
    assert torch.equal(pulls[0]["c"], pulls[1]["c"])
    parts = [quadratic_penalty({n: theta[n]}, anchor, large, strength=1.0) for n in theta]
    torch.testing.assert_close(quadratic_penalty(theta, anchor, large, strength=1.0), torch.stack(parts).sum())


def test_unit_precision_is_l2_towards_the_start() -> None:
    theta, start = random_tensors(0), random_tensors(1)
    ones = {name: torch.ones_like(t) for name, t in theta.items()}
    distance = torch.cat([(theta[n] - start[n]).flatten() for n in theta]).norm()
    torch.testing.assert_close(quadratic_penalty(theta, start, ones, strength=0.1), 0.05 * distance**2)


# --- the sum of quadratics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domains", [1, 2, 3, 6])
def test_many_quadratics_are_one(domains: int) -> None:
    """Precision, anchor and constant of constant size give Σ_k P_k (θ - θ_k)² at every θ."""
    quadratics = [(random_precision(10 + k), random_tensors(20 + k)) for k in range(domains)]
    precision, anchor = quadratics[0]
    constant = torch.zeros((), dtype=torch.float64)
    for quadratic in quadratics[1:]:
        precision, anchor, constant = add_quadratics((precision, anchor, constant), quadratic)
    for seed in range(5):
        theta = {name: 3 * t for name, t in random_tensors(seed).items()}
        separate = torch.stack([square(p, theta, a) for p, a in quadratics]).sum()
        torch.testing.assert_close(square(precision, theta, anchor) + constant, separate, rtol=1e-12, atol=0)


def test_where_nothing_matters_the_anchor_is_the_latest() -> None:
    zeros = {name: torch.zeros_like(t) for name, t in random_tensors(0).items()}
    first, second = random_tensors(1), random_tensors(2)
    precision, anchor, constant = add_quadratics((zeros, first, torch.zeros(())), (zeros, second))
    assert all(torch.equal(anchor[n], second[n]) for n in second)
    assert not any(t.any() for t in precision.values())
    assert float(constant) == 0
