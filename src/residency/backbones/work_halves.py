"""FLOPs of an encoder-decoder: what passes the encoder, what passes the decoder, and the attention between them.

Counted as in `residency.backbones.work`: 2 per weight and position forward, 2 for the gradient of an input that has
one, 2 for that of a weight that trains; 4 per pair of positions and unit of width forward, 8 backward.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Halves", "Passed", "halves_of"]

_READS_STATES = re.compile(r"EncDecAttention\.(k|v)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """The rows of one pass.

    Args:
        encoded: Rows of the encoder, of `read` positions each, padding included.
        read: See `encoded`.
        decoded: Rows of the decoder, of `written` positions each.
        written: See `decoded`.
    """

    encoded: int
    read: int
    decoded: int
    written: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    """Numbers of weights, by whose positions are multiplied with them.

    Args:
        encoder: The encoder's own.
        states: Keys and values that the decoder reads from the encoder's states, one set per row of the decoder.
        decoder: All others of the decoder, with the head.
        head: Of the head.
        trained: Of each of the three, what trains.
        attention: Width of queries.
        layers: Of the encoder, of the decoder.
    """

    encoder: int
    states: int
    decoder: int
    head: int
    trained: tuple[int, int, int]
    attention: int
    layers: tuple[int, int]

    def forward(self, at: Passed) -> int:
        """FLOPs of a forward pass."""
        return 2 * sum(n * p for n, p in zip(self._weights, _positions(at), strict=True)) + 4 * sum(self._pairs(at))

    def backward(self, at: Passed) -> int:
        """FLOPs of the backward pass that follows; nothing flows into an encoder in which nothing trains."""
        positions = _positions(at)
        through = (self.trained[0] > 0, self.trained[0] > 0, True)
        passed = sum(n * p for n, p, on in zip(self._weights, positions, through, strict=True) if on)
        trained = sum(n * p for n, p in zip(self.trained, positions, strict=True))
        pairs = self._pairs(at)
        return 2 * (passed + trained) + 8 * (pairs[0] * (self.trained[0] > 0) + pairs[1])

    def again(self, at: Passed) -> int:
        """FLOPs that gradient checkpointing computes again: the blocks, not the head."""
        return self.forward(at) - 2 * self.head * at.decoded * at.written

    @property
    def _weights(self) -> tuple[int, int, int]:
        return self.encoder, self.states, self.decoder

    def _pairs(self, at: Passed) -> tuple[int, int]:
        own = at.encoded * at.read**2 * self.layers[0]
        between = at.decoded * at.written * (at.written + at.read) * self.layers[1]
        return own * self.attention, between * self.attention


def _positions(at: Passed) -> tuple[int, int, int]:
    return at.encoded * at.read, at.decoded * at.read, at.decoded * at.written


def halves_of(model: nn.Module) -> Halves:
    """What an encoder-decoder of the T5 family computes with, its adapter attached."""
    core: Any = model
    config, encoder = core.config, core.get_encoder()
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = core.get_output_embeddings().weight
    owned = {id(p) for p in encoder.parameters()}
    sizes, trained = [0, 0, 0], [0, 0, 0]
    for name, p in model.named_parameters():
        if p.ndim < 2 or (id(p) in tables and p is not head):
            continue
        half = 0 if id(p) in owned else 1 if _READS_STATES.search(name) else 2
        sizes[half] += p.numel()
        trained[half] += p.numel() * p.requires_grad
    return Halves(
        encoder=sizes[0],
        states=sizes[1],
        decoder=sizes[2],
        head=head.numel(),
        trained=(trained[0], trained[1], trained[2]),
        attention=config.num_heads * config.d_kv,
        layers=(config.num_layers, config.num_decoder_layers),
    )
