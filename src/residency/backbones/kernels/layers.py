"""Which layers of a model run as one node, and when.

A layer is taken where its children have the names of the Llama family and trying finds the same values: architectures
share this shape under many names. At every call it steps aside for all that the node does not know: padded batches,
memories, hooks on a part, trained norms or weights, other adapters, dropout, autocast, half precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from residency.backbones.kernels.decoder import Norm, Parts, decoder_layer
from residency.backbones.kernels.hooks import watched
from residency.backbones.kernels.lora import as_linear
from residency.backbones.kernels.norm import is_plain_norm
from residency.backbones.kernels.segments import segments_seen

__all__ = ["fuse_layers"]

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
# Of values near one, as for the other nodes: rounding is some 1e-6.
_TOLERANCE = 1e-4
# What the node reads, and what transformers hands to a layer besides that a packed row does not need.
_KNOWN = {"segments", "position_embeddings", "position_ids", "use_cache", "cache_position"}


def fuse_layers(model: nn.Module) -> int:
    """Let the decoder layers of a model run as one node each, where that computes the same.

    Args:
        model: On any device, with its norms fused. Layers that are trimmed or checkpointed stay as they are.

    Returns:
        The number of layers.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    known: dict[Any, bool] = {}
    count = 0
    for layer in layers if isinstance(layers, nn.ModuleList) else ():
        if "forward" in vars(layer) or not _has_shape(layer):
            continue
        kind = _signature(layer)
        if kind not in known:
            known[kind] = _is_plain(layer)
        if known[kind]:
            layer.forward = _Fused(layer)
            count += 1
    return count


def _has_shape(layer: Any) -> bool:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attention is None or mlp is None:
        return False
    norms = (getattr(layer, "input_layernorm", None), getattr(layer, "post_attention_layernorm", None))
    linear = [getattr(attention, name, None) for name in _ATTENTION]
    linear += [getattr(mlp, name, None) for name in _FEED_FORWARD]
    if any(type(part) is not nn.Linear for part in linear) or len(list(attention.children())) != len(_ATTENTION):
        return False
    return all(isinstance(norm, nn.Module) and is_plain_norm(norm) for norm in norms) and _is_untouched(attention, mlp)


def _is_untouched(attention: Any, mlp: Any) -> bool:
    """Whether both run the code of their class: as it is, or with rotary positions as a node."""
    own = getattr(attention.forward, "__func__", None)
    same = own is not None and own.__code__ is type(attention).forward.__code__
    return same and "forward" not in vars(mlp)


def _signature(layer: Any) -> Any:
    """What layers that compute the same have in common: classes and numbers of the layer and of its parts."""
    parts = (layer, layer.self_attn, layer.mlp)
    plain = (bool, int, float, str, type(None))
    numbers = [{k: v for k, v in vars(p).items() if isinstance(v, plain) and k != "layer_idx"} for p in parts]
    return tuple(type(p) for p in parts), tuple(tuple(sorted(n.items(), key=str)) for n in numbers)


@torch.no_grad()
def _is_plain(layer: Any) -> bool:
    attention = layer.self_attn
    weight, d = attention.q_proj.weight, getattr(attention, "head_dim", None)
    if (
        _is_windowed(attention)
        or weight.device.type != "cpu"
        or weight.dtype != torch.float32
        or not isinstance(d, int)
        or d % 2
    ):
        return False
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, weight.shape[1], generator=draw)
    angle = torch.randn(1, 6, d // 2, generator=draw).repeat(1, 1, 2)
    segments = ((4,), (2,))
    options = {"position_embeddings": (angle.cos(), angle.sin()), "segments": segments}
    try:
        expected = type(layer).forward(layer, x, attention_mask=None, past_key_values=None, use_cache=False, **options)
        parts = _parts(layer, _kinds(layer), x)
        if parts is None:
            return False
        cos, sin = (t[0].unsqueeze(1) for t in (angle.cos(), angle.sin()))
        found = decoder_layer(x[0], cos, sin, segments_seen(segments), parts)[None]
    except Exception:  # another signature, or no such kernel in this torch: not ours to replace
        return False
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    # The sum with x would hide what the parts do.
    return bool((expected - found).abs().max() <= _TOLERANCE * (expected - x).abs().max())


def _is_windowed(attention: Any) -> bool:
    """Whether far tokens may be hidden, which a try with a few tokens would not show."""
    where = (attention, getattr(attention, "config", None))
    return any(getattr(w, name, None) is not None for w in where for name in ("sliding_window", "attention_chunk_size"))


def _kinds(layer: Any) -> tuple[type, type]:
    """Adapters put their own modules in the place of a part."""
    return type(layer.self_attn), type(layer.mlp)


class _Fused:
    """The forward of a layer that is one node where it can be, and the chain of its modules where it cannot."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._kinds = _kinds(layer)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer, seen, parts = self._layer, kwargs.get("segments"), None
        if not args and seen is not None and _is_packed(hidden_states, kwargs):
            parts = _parts(layer, self._kinds, hidden_states)
        # Positions of half a head are another function.
        if parts is None or kwargs["position_embeddings"][0].shape[-1] != parts.head_dim:
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        cos, sin = (t[0].unsqueeze(1) for t in kwargs["position_embeddings"])
        return decoder_layer(hidden_states[0], cos, sin, segments_seen(seen), parts)[None]


def _is_packed(x: Tensor, options: dict[str, Any]) -> bool:
    cos, sin = options.get("position_embeddings") or (None, None)
    if cos is None or sin is None or x.dim() != 3 or x.shape[0] != 1 or not x.device.type == cos.device.type == "cpu":
        return False
    if not x.dtype == cos.dtype == sin.dtype == torch.float32 or cos.dim() != 3 or cos.shape[0] != 1:
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    return all(value is None or name in _KNOWN for name, value in options.items())


def _parts(layer: Any, kinds: tuple[type, type], x: Tensor) -> Parts | None:
    """The parts of a layer, where all of them are what the node computes, now."""
    children = layer._modules
    attention, mlp = children["self_attn"], children["mlp"]
    if (type(attention), type(mlp)) != kinds or layer.__dict__.get("gradient_checkpointing"):
        return None  # transformers checkpoints inside of the forward of the class
    if watched(attention) or watched(mlp) or watched(mlp._modules["act_fn"]) or not _is_untouched(attention, mlp):
        return None
    numbers = attention.__dict__
    if layer.training and numbers.get("attention_dropout"):
        return None
    norms = (children["input_layernorm"], children["post_attention_layernorm"])
    gradient = torch.is_grad_enabled()
    for norm in norms:
        if not is_plain_norm(norm) or watched(norm) or (gradient and norm.weight.requires_grad):
            return None
    modules = [attention._modules[name] for name in _ATTENTION] + [mlp._modules[name] for name in _FEED_FORWARD]
    linear = []
    for module in modules:
        part = as_linear(module, x)
        if part is None:
            return None
        linear.append(part)
    first, second = (Norm(norm.weight, norm.variance_epsilon) for norm in norms)
    return Parts(tuple(linear), (first, second), numbers["head_dim"], numbers["scaling"])
