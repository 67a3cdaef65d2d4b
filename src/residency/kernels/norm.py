"""RMS normalisation by torch's own kernel instead of a chain of six."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["fuse_norms"]

# Of the outputs on normal inputs: rounding is some 1e-6, another formula (1 + weight, no weight) is off by 1.
_TOLERANCE = 1e-5


def fuse_norms(model: nn.Module) -> int:
    """Run every RMS norm of a model by `torch.nn.functional.rms_norm`, where that computes the same.

    Asked of each class of the model itself, by trying: architectures write the same norm under many names, and
    different ones under the same (Gemma multiplies by 1 + weight). Norms that are not float32 stay as they are: their
    chains round in between, and the result would be another one.

    Returns:
        The number of norms.
    """
    known: dict[type, bool] = {}
    count = 0
    for module in model.modules():
        kind = type(module)
        if not kind.__name__.endswith("RMSNorm") or kind.__module__.startswith("torch."):
            continue
        if kind not in known:
            known[kind] = _is_plain(module)
        if known[kind] and module.weight.dtype == torch.float32:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
            count += 1
    return count


def _forward(norm: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype != norm.weight.dtype:
        out: Tensor = type(norm).forward(norm, hidden_states)
        return out
    return F.rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)


@torch.no_grad()
def _is_plain(norm: nn.Module) -> bool:
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or not isinstance(epsilon, float) or weight.dtype != torch.float32:
        return False
    draw = torch.Generator().manual_seed(0)
    # Small inputs too: epsilon must be inside of the root.
    x = torch.randn(8, weight.numel(), generator=draw) * torch.logspace(-4, 1, 8)[:, None]
    x = x.to(weight.device)
    expected, found = norm(x), F.rms_norm(x, weight.shape, weight, epsilon)
    return bool((expected - found).abs().max() <= _TOLERANCE * expected.abs().max().clamp_min(1e-6))
