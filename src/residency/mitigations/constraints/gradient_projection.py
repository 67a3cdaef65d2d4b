"""Projections of a gradient on the side of others (A-GEM, GEM), and the gradients that they are projected against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from residency.core.batching import by_token_budget
from residency.core.types import Example, Tensors
from residency.mitigations.contract import StageModule

__all__ = ["dual_weights", "inner", "project_agem", "project_gem", "reference_gradient"]


def inner(first: Tensors, second: Tensors) -> Tensor:
    """Inner product of two flat vectors that are kept as named tensors; a scalar, at least float32.

    A sum of squares above 65504 is infinite in float16, and the projection NaN.
    """
    return torch.stack([torch.dot(_single(first[n]), _single(second[n])) for n in first]).sum()


def _single(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).flatten()


def project_agem(gradient: Tensors, reference: Tensors, *, strength: float = 1.0) -> Tensors:
    """Remove what of a gradient points against the reference.

    Args:
        gradient: g.
        reference: r, same names and shapes.
        strength: Share of that part that is removed, in [0, 1]. 1 = the paper: the result has g·r >= 0.

    Returns:
        g itself if g·r >= 0 or r = 0.
    """
    dot, square = inner(gradient, reference), inner(reference, reference)
    if dot >= 0 or square == 0:
        return gradient
    factor = strength * dot / square
    return {name: g - factor.to(g.dtype) * reference[name] for name, g in gradient.items()}


def dual_weights(gram: np.ndarray, products: np.ndarray, *, margin: float, ridge: float) -> np.ndarray:
    """v = argmin_{v >= margin} ½ vᵀ Q v + pᵀ v, as non-negative least squares in v - margin.

    Args:
        gram: R Rᵀ, (k, k).
        products: p = R g, (k,).
        margin: Smallest v.
        ridge: Q = R Rᵀ + ridge · mean(diag(R Rᵀ)) · I. The authors' ridge is an absolute 1e-3, which on small gradients
            would switch the constraints off; relative to their size it means the same everywhere.
    """
    from scipy.optimize import nnls  # takes long to load

    size = len(gram)
    q = gram + ridge * gram.trace() / size * np.eye(size)
    linear = q @ np.full(size, margin) + products
    # ½ uᵀQu + cᵀu = ½‖S u + S⁻ᵀc‖² + const with Q = SᵀS; directions in which Q vanishes cannot lower it.
    values, vectors = np.linalg.eigh(q)
    kept = values > 1e-12 * max(values.max(), 0.0)
    roots, axes = np.sqrt(values[kept]), vectors[:, kept]
    free, _ = nnls(roots[:, None] * axes.T, -(axes.T @ linear) / roots)
    return np.asarray(free + margin)


def project_gem(
    gradient: Tensors, references: Sequence[Tensors], *, margin: float = 0.5, ridge: float = 1e-3, strength: float = 1.0
) -> Tensors:
    """The nearest gradient that does not point against any reference (for margin 0 and ridge 0).

    Args:
        gradient: g.
        references: r_1 ... r_k, same names and shapes.
        margin: Smallest weight of every reference in the correction; above 0 it favours earlier domains.
        ridge: See `dual_weights`.
        strength: Share of the correction that is made, in [0, 1].

    Returns:
        g itself if no g·r_i < 0.
    """
    products = torch.stack([inner(gradient, r) for r in references])
    if bool((products >= 0).all()):
        return gradient
    gram = torch.stack([torch.stack([inner(a, b) for b in references]) for a in references])
    v = dual_weights(gram.double().cpu().numpy(), products.double().cpu().numpy(), margin=margin, ridge=ridge)
    final = dict(gradient)
    for weight, reference in zip((strength * v).tolist(), references, strict=True):
        final = {name: g + weight * reference[name] for name, g in final.items()}
    return final


def reference_gradient(
    module: StageModule, examples: Sequence[Example], names: Sequence[str], *, batch_tokens: int
) -> dict[str, Tensor]:
    """Gradient of the objective on stored examples at the current weights, without dropout; `.grad` is not touched.

    Args:
        module: The module.
        examples: At least one.
        names: Of the leaves.
        batch_tokens: Tokens per pass; passes are weighted by the objective's units, so the result does not depend on
            it.
    """
    trainable = module.adapter.trainable(module.model)
    leaves = [trainable[name] for name in names]
    groups = list(by_token_budget(examples, tokens=batch_tokens))
    batches = [module.objective.collate(g, layout=module.layout).to(module.device) for g in groups]
    total = sum(module.objective.units(example) for example in examples)
    base = module.reference_forward if "reference" in module.adapter.provides else None
    found = [torch.zeros_like(leaf) for leaf in leaves]
    training = module.model.training
    module.model.eval()
    try:
        for batch in batches:
            with torch.enable_grad():
                loss = module.objective.per_example(module.trained_forward, batch, base).sum() / total
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            found = [f if g is None else f + g for f, g in zip(found, gradients, strict=True)]
    finally:
        module.model.train(training)
    return dict(zip(names, found, strict=True))
