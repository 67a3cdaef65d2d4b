"""Quadratic pulls λ/2 Σ P (θ - θ*)²: value, gradient, and sums of several. EWC, SI, MAS and L2-SP differ in P and θ*.

The gradient λ P (θ - θ*) is known, so it is added to the gradients once per optimizer step, after accumulation, and
never built by autograd; the value is only for the log.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from residency.core.types import Tensors
from residency.mitigations.base import State

__all__ = [
    "add_pulls",
    "add_quadratics",
    "penalty_numbers",
    "penalty_term",
    "pulled_gradients",
    "quadratic_penalty",
    "quadratic_pull",
]


def quadratic_penalty(parameters: Tensors, anchor: Tensors, precision: Tensors, *, strength: float) -> Tensor:
    """λ/2 Σ P (θ - θ*)².

    Args:
        parameters: θ.
        anchor: θ*, same names and shapes.
        precision: P >= 0, same names and shapes.
        strength: λ.

    Returns:
        Scalar.
    """
    sums = [(precision[n] * (theta - anchor[n]).square()).sum() for n, theta in parameters.items()]
    return 0.5 * strength * torch.stack(sums).sum()


def quadratic_pull(parameters: Tensors, anchor: Tensors, precision: Tensors, *, strength: float) -> dict[str, Tensor]:
    """The gradient of `quadratic_penalty`: λ P (θ - θ*), by name."""
    names = list(parameters)
    pulls = torch._foreach_sub([parameters[n].detach() for n in names], [anchor[n] for n in names])
    pulls = torch._foreach_mul(pulls, [precision[n] for n in names])
    torch._foreach_mul_(pulls, strength)
    return dict(zip(names, pulls, strict=True))


def add_pulls(gradients: Tensors, pulls: Tensors) -> dict[str, Tensor]:
    """Gradients with pulls added, in the gradients' own types; a parameter without a gradient gets the pull alone."""
    added = {n: gradients[n] + pull.to(gradients[n].dtype) for n, pull in pulls.items() if n in gradients}
    return {**gradients, **pulls, **added}


def add_quadratics(
    first: tuple[Tensors, Tensors, Tensor], second: tuple[Tensors, Tensors]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Σ_k P_k (θ - θ_k)² of any number of domains as ONE quadratic, exactly and in constant memory.

        P1 (θ - a)² + P2 (θ - b)² = (P1 + P2) (θ - c)² + P1 P2 / (P1 + P2) · (a - b)²,   c = (P1 a + P2 b) / (P1 + P2)

    Args:
        first: (precision, anchor, constant) so far.
        second: (precision, anchor) to add.

    Returns:
        (precision, anchor, constant); where both precisions are 0 the anchor is the second one.
    """
    precision, anchor, constant = first
    added, at = second
    total = {name: precision[name] + added[name] for name in added}
    share = {name: torch.where(total[name] > 0, added[name] / total[name], torch.ones_like(at[name])) for name in added}
    centre = {name: torch.lerp(anchor[name], at[name], share[name].to(at[name].dtype)) for name in added}
    rest = sum((precision[n] * share[n] * (anchor[n] - at[n]).square()).sum() for n in added)
    return total, centre, constant + rest


# -- hooks of mitigations whose state is {"precision", "anchor"[, "constant"]} -----------------------------------------


@torch.no_grad()
def penalty_term(parameters: Tensors, state: Mapping[str, State], *, strength: float) -> dict[str, Tensor]:
    """What `loss_terms` returns: the value without a gradient, which `pulled_gradients` adds; nothing if all is 0."""
    precision, anchor = _quadratic(state)
    if not precision or strength == 0:
        return {}
    constant = state.get("constant", torch.zeros(()))
    assert isinstance(constant, Tensor)
    return {"penalty": quadratic_penalty(parameters, anchor, precision, strength=strength) + 0.5 * strength * constant}


@torch.no_grad()
def pulled_gradients(
    gradients: Tensors, parameters: Tensors, state: Mapping[str, State], *, strength: float
) -> Tensors:
    """What `transform_gradients` returns: the very argument if the penalty is 0 everywhere."""
    precision, anchor = _quadratic(state)
    if not precision or strength == 0:
        return gradients
    return add_pulls(gradients, quadratic_pull(parameters, anchor, precision, strength=strength))


@torch.no_grad()
def penalty_numbers(parameters: Tensors, state: Mapping[str, State], *, strength: float) -> dict[str, float]:
    """`distance` ‖θ - θ*‖, without which a small penalty says nothing, and `pull` ‖λ P (θ - θ*)‖."""
    precision, anchor = _quadratic(state)
    if not precision or strength == 0:
        return {}
    distances = [(theta.float() - anchor[n]).norm() for n, theta in parameters.items()]
    pulls = [p.float().norm() for p in quadratic_pull(parameters, anchor, precision, strength=strength).values()]
    return {"distance": float(torch.stack(distances).norm()), "pull": float(torch.stack(pulls).norm())}


def _quadratic(state: Mapping[str, State]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    precision, anchor = state["precision"], state["anchor"]
    assert isinstance(precision, dict)
    assert isinstance(anchor, dict)
    return precision, anchor
