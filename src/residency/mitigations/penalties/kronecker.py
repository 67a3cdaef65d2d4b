"""Quadratic penalties on an update ΔW = s B A in the space of the WEIGHTS, through its factors: pure functions.

    ½ vec(ΔW - ΔW*)ᵀ (Ā ⊗ Ḡ) vec(ΔW - ΔW*),     Ā (in, in) >= 0,  Ḡ (out, out) >= 0

With Ā = E[x xᵀ] and Ḡ = E[g gᵀ] this is K-FAC's approximation of the Fisher penalty (Martens and Grosse 2015; Ritter et
al. 2018); with Ā = Ḡ = 1 it is ½ ‖ΔW - ΔW*‖². Unlike a penalty on A and B it does not depend on the gauge
(B M, M⁻¹ A), and it sees the weight at B = 0, where every gradient of A is 0.

The difference of two rank-r updates is a product of rank 2 r, so that no (out, in) matrix is ever made:

    B A - B* A* = L R,     L = [B - B*, B*] (out, 2r),     R = [A; A - A*] (2r, in)

and the penalty is ½ s² tr[(Lᵀ Ḡ L)(R Ā Rᵀ)], which is exactly 0 at the anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from residency.adapters.algebra.covariance import tokens_of
from residency.adapters.base import LowRankLayer
from residency.core.types import Batch, Tensors
from residency.mitigations.penalties.per_example import ExampleLosses

__all__ = ["kronecker_factors", "low_rank_pull", "low_rank_pulls", "pull_flops"]


def low_rank_pull(
    b: Tensor,
    a: Tensor,
    old_b: Tensor,
    old_a: Tensor,
    *,
    scale: float,
    inputs: Tensor | None = None,
    outputs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The penalty ½ s² tr[(Lᵀ Ḡ L)(R Ā Rᵀ)] and its gradients.

    Args:
        b: B (out, r).
        a: A (r, in).
        old_b: B* (out, r).
        old_a: A* (r, in).
        scale: s.
        inputs: Ā (in, in), symmetric; `None` = the identity.
        outputs: Ḡ (out, out), symmetric; `None` = the identity.

    Returns:
        Value (), gradient for B (out, r), gradient for A (r, in).
    """
    left, right = torch.cat([b - old_b, old_b], 1), torch.cat([a, a - old_a])
    g_left = left if outputs is None else outputs @ left
    right_a = right if inputs is None else right @ inputs
    value = 0.5 * scale**2 * ((left.T @ g_left) * (right_a @ right.T)).sum()
    return value, scale**2 * (g_left @ (right_a @ a.T)), scale**2 * ((b.T @ g_left) @ right_a)


def pull_flops(b: Tensor, a: Tensor) -> int:
    """Of `low_rank_pull` with Ā and Ḡ, for B (out, r) and A (r, in)."""
    (out, rank), size = b.shape, a.shape[1]
    return 4 * rank * (out**2 + size**2) + 16 * rank**2 * (out + size)


@torch.no_grad()
def low_rank_pulls(
    layers: Iterable[LowRankLayer],
    leaves: Tensors,
    anchor: Tensors,
    *,
    strength: float,
    inputs: Callable[[str], Tensor | None] = lambda path: None,
    outputs: Callable[[str], Tensor | None] = lambda path: None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """λ times the penalty of all layers, and its gradient by parameter name.

    Args:
        layers: Which factors belong together.
        leaves: A and B by name.
        anchor: A* and B* by the same names.
        strength: λ.
        inputs: Path of a layer -> Ā.
        outputs: Path of a layer -> Ḡ.
    """
    values: list[Tensor] = []
    pulls: dict[str, Tensor] = {}
    for layer in layers:
        factors = (t[n].detach().float() for t in (leaves, anchor) for n in (layer.b, layer.a))
        a_cov, g_cov = inputs(layer.path), outputs(layer.path)
        value, pull_b, pull_a = low_rank_pull(*factors, scale=layer.scale, inputs=a_cov, outputs=g_cov)
        values.append(value)
        pulls |= {layer.b: strength * pull_b, layer.a: strength * pull_a}
    return strength * torch.stack(values).sum(), pulls


def kronecker_factors(
    layers: Mapping[str, nn.Module], batches: Iterable[Batch], losses: ExampleLosses
) -> tuple[dict[str, str], dict[str, Tensor], dict[str, Tensor]]:
    """Ā and Ḡ of every layer; their product is the Fisher information per sequence, without cross terms of tokens.

    Layers that read the same tensor (query, key and value; gate and up) share one Ā.

    Args:
        layers: By path; each is called once with its input x as the first argument and returns y.
        batches: Any grouping of the examples; the result does not depend on it.
        losses: Batch -> (B,) negative log-likelihoods.

    Returns:
        Path -> path of the layer that keeps its Ā; that path -> Ā = mean over tokens of x xᵀ; path -> Ḡ = mean over
        sequences of Σ_tokens g gᵀ with g = ∂ loss / ∂y; float32.
    """
    shared: dict[str, str] = {}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    tokens, examples = 0, 0
    for batch in batches:
        calls = _calls(layers, partial(_summed, losses, batch))
        first: dict[int, str] = {}
        for path, (x, gradient) in calls.items():
            # A layer keeps an Ā of its own from the first batch on, or never.
            owner = shared.setdefault(path, first.setdefault(id(x), path))
            if owner == path:
                _accumulate(inputs, path, _rows(x, batch))
            _accumulate(outputs, path, _rows(gradient, batch))
        tokens, examples = tokens + batch.tokens, examples + batch.size
    if examples == 0:
        raise ValueError("Kronecker factors need at least one example, got none")
    return shared, {p: t / tokens for p, t in inputs.items()}, {p: t / examples for p, t in outputs.items()}


def _summed(losses: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    return losses(batch).sum()


def _calls(layers: Mapping[str, nn.Module], loss: Callable[[], Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Path -> (input, gradient of the output) of one pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():  # a reference that the loss asks, too, runs the same layers without a gradient
            seen[path] = (args[0], output)

    hooks = [layer.register_forward_hook(partial(keep, path)) for path, layer in layers.items()]
    try:
        total = loss()
    finally:
        for hook in hooks:
            hook.remove()
    gradients = torch.autograd.grad(total, [y for _, y in seen.values()])
    return {path: (x, gradient) for (path, (x, _)), gradient in zip(seen.items(), gradients, strict=True)}


def _rows(tensor: Tensor, batch: Batch) -> Tensor:
    """(tokens, D), without padding; a head that runs at the supervised positions only has no padding to leave out."""
    if batch.attention_mask is None or tensor.shape[:2] != batch.attention_mask.shape:
        return tensor.detach().reshape(-1, tensor.shape[-1]).float()
    return tokens_of(tensor.detach(), batch).float()


def _accumulate(into: dict[str, Tensor], path: str, rows: Tensor) -> None:
    product = rows.T @ rows
    into[path] = into[path] + product if path in into else product
