"""May the examples of a packed row be computed apart, in threads of their own, and does it pay?"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from residency.backbones.kernels.hooks import watched
from residency.core.types import Batch

__all__ = ["Lanes", "lanes_for"]

Lanes = Literal["auto"] | int

# Two one-thread lanes against two threads on SmolLM2-135M: as fast with 176 tokens, 1.12 times with 517. A model
# of two small layers is all Python, which threads do not share.
_MIN_TOKENS = 64
_MIN_PARAMETERS = 20_000_000
# Every lane computes a gradient of its own for all that is trained.
_MAX_TRAINED = 0.1
_PLAIN = ("torch.nn.modules.", "transformers.", "peft.peft_model", "peft.tuners.lora.model")
_CHANGING_POSITIONS = ("dynamic", "longrope")


def lanes_for(model: nn.Module, batch: Batch, asked: Lanes) -> tuple[int, list[nn.Parameter]]:
    """In how many lanes a batch is computed: a function of the model, the batch and the number of threads.

    Args:
        model: With its adapter.
        batch: In its layout.
        asked: Most lanes; `auto` = two, where there are threads and work for two.

    Returns:
        The number, and what is trained (nothing where gradients are off). The number is 1 unless every part of the
        model is known to treat tokens one by one (or example by example: attention), without random numbers, without
        work that does not shrink with the tokens (4-bit weights, DoRA's norms) and without anybody watching.
    """
    most = min(2 if asked == "auto" else asked, len(batch.segments))
    if most < 2 or batch.layout != "packed" or len(batch.targets) != len(batch.target_at):
        return 1, []
    if batch.input_ids.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return 1, []
    if asked == "auto" and (torch.get_num_threads() < 2 or batch.input_ids.numel() < _MIN_TOKENS):
        return 1, []
    if _may_change(getattr(model, "config", None), training=model.training):
        return 1, []
    modules = _walk(model)
    if any(watched(module) or _is_odd(module) for module in modules):
        return 1, []
    parameters = {id(p): p for m in modules for p in m._parameters.values() if p is not None}.values()
    total = sum(p.numel() for p in parameters)
    leaves = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    if any(p._backward_hooks for p in leaves):
        return 1, []
    if asked == "auto" and (total < _MIN_PARAMETERS or sum(p.numel() for p in leaves) > _MAX_TRAINED * total):
        return 1, []
    return most, leaves


def _walk(model: nn.Module) -> list[nn.Module]:
    """All modules, each once: what `Module.modules` yields, without nested generators, since every step asks."""
    found, left = {}, [model]
    while left:
        module = left.pop()
        if id(module) not in found:
            found[id(module)] = module
            left += [child for child in module._modules.values() if child is not None]
    return list(found.values())


def _may_change(config: Any, *, training: bool) -> bool:
    """Whether positions depend on what else is in the row, or random numbers are drawn."""
    rope = getattr(config, "rope_parameters", None)
    changing = isinstance(rope, dict) and rope.get("rope_type") in _CHANGING_POSITIONS
    return changing or (training and _drops(config))


def _drops(config: Any) -> bool:
    values = vars(config) if hasattr(config, "__dict__") else {}
    return any("drop" in key and isinstance(v, float | int) and v > 0 for key, v in values.items())


def _is_odd(module: Any) -> bool:
    nature = _nature(module.__class__)
    if nature == "lora":
        return bool(module.lora_variant) and not module.merged
    return nature == "odd" or (nature == "dropout" and module.training and module.p > 0)


@lru_cache(maxsize=512)
def _nature(kind: type) -> Literal["plain", "lora", "dropout", "odd"]:
    from peft.tuners.lora import Linear

    if kind is Linear:
        return "lora"
    if issubclass(kind, nn.modules.dropout._DropoutNd):
        return "dropout"
    return "plain" if (kind.__module__ or "").startswith(_PLAIN) else "odd"
