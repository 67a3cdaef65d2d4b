"""Which trainable matrices multiply features, and along which axis: what masks and projections of an update act on.

    weight  of a linear layer: its columns are input features of the layer, its rows output features
    A       of LoRA: its columns are input features of the adapted layer, its rows a space of its own
    B       of LoRA: its columns are that space (its input is A x), its rows output features of the layer

GPT-2's `Conv1D` stores (in, out), everything else (out, in).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from residency.core.batching import by_token_budget, make_batch
from residency.core.types import Batch, Example, Tensors, untyped
from residency.mitigations.contract import StageModule

__all__ = ["LinearMap", "kept_share", "layer_weight", "linear_maps", "passes"]

_FACTOR = re.compile(r"^(.+)\.lora_([AB])\.\w+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMap:
    """A trainable matrix and where it stands.

    Args:
        kind: See the head of this file.
        owner: Path of the module that multiplies with it.
        layer: Path of the layer it belongs to: the owner, or the adapted layer.
        transposed: Whether it is stored (in, out).
    """

    kind: Literal["weight", "A", "B"]
    owner: str
    layer: str
    transposed: bool

    def over_inputs(self, features: Tensor) -> Tensor:
        """(in,) in a shape that broadcasts against the matrix as it is stored."""
        return features[:, None] if self.transposed else features[None, :]

    def over_outputs(self, features: Tensor) -> Tensor:
        """(out,) in a shape that broadcasts against the matrix as it is stored."""
        return features[None, :] if self.transposed else features[:, None]

    def by_input(self, matrix: Tensor) -> Tensor:
        """The matrix as (in, out); its own inverse."""
        return matrix if self.transposed else matrix.T


def linear_maps(model: nn.Module, names: Iterable[str]) -> dict[str, LinearMap]:
    """Those of the named parameters that are matrices of linear layers or of LoRA.

    Norms, biases and embeddings (and a head that is tied to them) have no input features and are left out.
    """
    found = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        if last != "weight" or not _is_linear(module := model.get_submodule(owner)):
            continue
        factor = _FACTOR.match(owner)
        kind: Any = factor.group(2) if factor else "weight"
        layer = factor.group(1) if factor else owner
        found[name] = LinearMap(kind=kind, owner=owner, layer=layer, transposed=_is_transposed(module))
    return found


@torch.no_grad()
def layer_weight(model: nn.Module, layer: str) -> Tensor:
    """The weight that a layer acts with, its LoRA included, dequantised, (out, in) float32."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    module: Any = model.get_submodule(layer)
    if not isinstance(module, LoraLayer):
        weight: Tensor = module.weight.detach().float()
        return weight.T if _is_transposed(module) else weight
    base = module.get_base_layer()
    weight = dequantize_module_weight(base).detach().float()
    for adapter in module.active_adapters:
        weight = weight + untyped(module).get_delta_weight(adapter).float()
    return weight.T if _is_transposed(base) else weight


def passes(module: StageModule, examples: Sequence[Example], *, tokens: int = 2048) -> Iterator[Batch]:
    """Batches without padding, each after the model has run on it in evaluation mode, without gradient."""
    training = module.model.training
    module.model.eval()
    try:
        # One example per row and batch has no padding; then all that a layer sees are tokens.
        for group in by_token_budget(examples, tokens=tokens if module.layout == "packed" else 1):
            batch = make_batch(group, layout=module.layout).to(module.device)
            with torch.no_grad():
                module.forward(batch)
            yield replace(batch, attention_mask=None)
    finally:
        module.model.train(training)


def kept_share(before: Tensors, after: Tensors, final: Tensors) -> Tensor:
    """‖final - before‖ / ‖after - before‖ over all tensors: how much of an update a mask or projection lets through."""
    names = list(after)
    kept, whole = (
        torch.stack([(tensors[n] - before[n]).float().norm() for n in names]).norm() for tensors in (final, after)
    )
    return torch.where(whole > 0, kept / whole, torch.ones_like(whole))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
