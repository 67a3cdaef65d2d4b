"""LoRA folded into the weights while a state is scored, and not a bit of it left afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["MERGE_BYTES", "merged_lora"]

MERGE_BYTES = 2**31
"""Adapted weights above this size stay unmerged: folding them costs their size again."""

# A sum that is rounded to 16 bits is another function; 4-bit and 8-bit codes cannot hold it at all.
_EXACT = (torch.float32, torch.float64)


@contextmanager
def merged_lora(model: nn.Module) -> Iterator[None]:
    """Inside the context every plain LoRA layer of PEFT is one matrix product, W + s B A.

    The merged weight is a tensor of its own that takes the place of W, so that W itself is never written to and comes
    back bit for bit. Memory: the adapted weights once more, at most `MERGE_BYTES`. Layers that are no plain LoRA in
    float32 or float64 (quantised, half precision, DoRA and other variants, switched off), or that somebody watches by a
    hook inside, are left as they are, which computes the same scores a little slower.

    Args:
        model: With a PEFT adapter or without; the active adapters are folded, all of them.
    """
    layers: list[Any] = [layer for layer in model.modules() if _foldable(layer)]
    size = sum(layer.get_base_layer().weight.nbytes for layer in layers)
    kept: list[tuple[Any, Any, Tensor]] = []
    try:
        if size <= MERGE_BYTES:
            for layer in layers:
                base = layer.get_base_layer()
                weight = base._parameters["weight"]
                base._parameters["weight"] = nn.Parameter(_folded(layer), requires_grad=False)
                kept.append((layer, base, weight))
                layer.merged_adapters.extend(layer.active_adapters)
        yield
    finally:
        for layer, base, weight in kept:
            base._parameters["weight"] = weight
            layer.merged_adapters.clear()


def _foldable(layer: Any) -> bool:
    if not isinstance(layer, Linear) or layer.disable_adapters or layer.merged:
        return False
    base = layer.get_base_layer()
    if type(base) not in (nn.Linear, Conv1D) or "weight" not in base._parameters or base.weight.dtype not in _EXACT:
        return False
    if type(base.weight) is not nn.Parameter:  # a part of it is here, the others are with other processes
        return False
    inner = [module for module in layer.modules() if module is not layer]
    if any(module._forward_hooks or module._forward_pre_hooks for module in inner):
        return False
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return bool(names) and all(
        name not in layer.lora_variant
        and not layer.lora_bias.get(name, False)
        and layer.lora_A[name].weight.dtype == layer.lora_B[name].weight.dtype == base.weight.dtype
        for name in names
    )


@torch.no_grad()
def _folded(layer: Any) -> Tensor:
    """W + s B A of all active adapters, as W is stored."""
    weight: Tensor = layer.get_base_layer().weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            left, right = (a.T, b.T) if layer.fan_in_fan_out else (b, a)
            weight = torch.addmm(weight, left, right, alpha=layer.scaling[name])
    return weight
