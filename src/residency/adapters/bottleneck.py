"""Bottleneck adapters: a small residual network behind the sublayers of every block (Houlsby 2019, Pfeiffer 2021)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from residency.adapters.base import Adapter
from residency.adapters.export_format import write_exported
from residency.backbones.structure import blocks
from residency.core.errors import UserError
from residency.core.types import Tensors, untyped

__all__ = ["Bottleneck"]

_NAME = "residency_bottleneck"
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "swish": F.silu}

Activation = Literal["relu", "gelu", "swish"]


class _Bottleneck(nn.Module):
    """h + s W_up σ(W_down h), h (..., D), W_down (D / reduction, D), W_up (D, D / reduction) zero at the start.

    In float32 whatever the backbone is.
    """

    def __init__(self, width: int, inner: int, *, scale: float, activation: Activation, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, inner)
        self.up = nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.scale, self.activation = scale, _ACTIVATIONS[activation]
        self.enabled = True
        self.to(device)

    def forward(self, h: Tensor) -> Tensor:
        if not self.enabled:
            return h
        # The layers are called, not their weights used: per-example gradients are taken from the calls of layers.
        x = h.to(self.down.weight.dtype)
        added: Tensor = self.up(self.activation(self.down(x)))
        return (x + self.scale * added).to(h.dtype)


def _behind(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a sublayer; a function of the module, so that a deep copy of the model has its own."""
    adapter: Any = module.get_submodule(_NAME)
    if isinstance(output, tuple):
        return (adapter(output[0]), *output[1:])
    return adapter(output)


class Bottleneck(Adapter):
    """A bottleneck behind sublayers of every block; the backbone is frozen.

    The output h of a sublayer becomes h + s W_up σ(W_down h), before the residual connection. W_up starts at zero, so
    the start is the pretrained model bit for bit. It cannot be merged (it is not linear) and no other library loads
    what it exports: `residency.adapters.export_format.attach_exported` does.

    Args:
        placement: `pfeiffer`: behind the feed-forward part. `houlsby`: behind attention too.
        reduction: Hidden size of the backbone over that of the bottleneck.
        activation: Of the bottleneck.
        scale: s.
        attention: Regular expression: the whole name of the attention module inside a block.
        feed_forward: Regular expression: the whole name of the feed-forward module inside a block.
    """

    provides = frozenset({"fixed_coordinates", "averageable", "reference"})

    def __init__(
        self,
        *,
        placement: Literal["pfeiffer", "houlsby"] = "pfeiffer",
        reduction: int = 16,
        activation: Activation = "gelu",
        scale: float = 1.0,
        attention: str = "self_attn|attn|attention|self_attention",
        feed_forward: str = "mlp|feed_forward|ffn|block_sparse_moe",
    ) -> None:
        if reduction < 1:
            raise UserError(
                f"model.adapter.reduction = {reduction}",
                why="the bottleneck is the hidden size divided by it",
                fix="give a whole number from 1 on; 16 is usual",
            )
        self.options: dict[str, Any] = {
            "placement": placement,
            "reduction": reduction,
            "activation": activation,
            "scale": scale,
            "attention": attention,
            "feed_forward": feed_forward,
        }

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze the backbone and add the bottlenecks.

        Raises:
            UserError: A block has no sublayer of the expected name.
        """
        if _bottlenecks(model):
            return model
        width = int(untyped(model).get_input_embeddings().embedding_dim)
        inner = max(1, width // self.options["reduction"])
        model.requires_grad_(False)
        for sublayer in self._sublayers(model):
            device = next(sublayer.parameters()).device
            shape = {key: self.options[key] for key in ("scale", "activation")}
            sublayer.add_module(_NAME, _Bottleneck(width, inner, device=device, **shape))
            sublayer.register_forward_hook(_behind)
        return model

    def detach(self, model: nn.Module) -> nn.Module:
        """Take every bottleneck and hook out again: the module tree is the pretrained one."""
        for module in _bottlenecks(model):
            delattr(module, _NAME)
            for key in [key for key, hook in module._forward_hooks.items() if hook is _behind]:
                del module._forward_hooks[key]
        return model

    def _sublayers(self, model: nn.Module) -> Iterator[nn.Module]:
        kinds = ("attention", "feed_forward") if self.options["placement"] == "houlsby" else ("feed_forward",)
        for name, block in blocks(model).items():
            children = dict(block.named_children())
            for kind in kinds:
                pattern = self.options[kind]
                hits = [child for key, child in children.items() if re.fullmatch(pattern, key)]
                if not hits:
                    raise UserError(
                        f"model.adapter.{kind} = {pattern!r} matches nothing in {name}: {', '.join(children)}",
                        why="a bottleneck stands behind that sublayer of every block",
                        fix=f"give the name it has in this model as model.adapter.{kind}",
                    )
                yield from hits

    def weights(self, model: nn.Module, state: Tensors) -> Tensors:
        """The parameters of the bottlenecks."""
        return state

    @torch.no_grad()
    def load_weights(self, model: nn.Module, weights: Tensors) -> Mapping[str, float]:
        """Copy them; exact."""
        self.load_state(model, weights)
        return {}

    @contextmanager
    def reference(self, model: nn.Module) -> Iterator[None]:
        """Bottlenecks off."""
        switches = [module.get_submodule(_NAME) for module in _bottlenecks(model)]
        for switch in switches:
            untyped(switch).enabled = False
        try:
            yield
        finally:
            for switch in switches:
                untyped(switch).enabled = True

    def export(self, model: nn.Module, path: Path) -> None:
        """A folder that `residency.adapters.export_format.attach_exported` loads."""
        write_exported(path, self, self.options, self.state(model))


def _bottlenecks(model: nn.Module) -> list[nn.Module]:
    """The sublayers that have one."""
    return [module for module in model.modules() if _NAME in dict(module.named_children())]
