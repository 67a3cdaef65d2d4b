"""Covariance of what goes into layers, over a stage's data; padding does not count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from residency.adapters.base import Observe
from residency.core.types import Batch

__all__ = ["covariance_flops", "input_covariances", "tokens_of"]


def input_covariances(layers: Mapping[str, nn.Module], observe: Observe) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Sum of x xᵀ over all tokens, for the input x of every layer.

    Layers that read the same tensor (query, key and value; gate and up) share one covariance.

    Args:
        layers: By path; each is called with its input as the first argument.
        observe: Runs the model over the data.

    Returns:
        Path -> path of the first layer with the same input; and that path -> (in, in), float32.
    """
    inputs: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    found: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[path] = args[0]

    hooks = [layer.register_forward_pre_hook(partial(keep, path)) for path, layer in layers.items()]
    try:
        for batch in observe():
            first: dict[int, str] = {}
            for path, x in inputs.items():
                owner = first.setdefault(id(x), path)
                shared.setdefault(path, owner)
                # A layer counts as its own owner from the first batch on, or never.
                if shared[path] == path:
                    rows = tokens_of(x, batch).float()
                    product = rows.T @ rows
                    found[path] = found[path].add_(product) if path in found else product
            inputs.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return shared, found


def covariance_flops(covariances: Iterable[Tensor], *, tokens: int) -> int:
    """Of Σ x xᵀ over so many tokens, for the covariances (D, D) that came out of it."""
    return sum(2 * tokens * len(covariance) ** 2 for covariance in covariances)


def tokens_of(x: Tensor, batch: Batch) -> Tensor:
    """(1, N, in) or (B, T, in) -> (tokens, in), without padding."""
    if batch.attention_mask is None:
        return x.reshape(-1, x.shape[-1])
    return x[batch.attention_mask.to(torch.bool)]
