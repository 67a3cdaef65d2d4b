"""How much memory a stage takes on one device, from sizes alone: nothing is loaded and nothing is run.

What is alive together, in bytes, is looked at in three places, and the largest of them is the peak:

    forward     weights + remembered + optimizer + gradients of the step before + activations + head
    step        weights + remembered + optimizer + gradients + copies of the leaves + what the step works with
    finish      weights + remembered + gradients + the mitigations' own passes

Activations are what a backward pass will read, per token and layer of the Llama family (D hidden, Q = H d width of
queries, K of keys, I feed-forward, r the LoRA ranks of the layer):

    one node      4 D + 2 Q + 2 K + 3 I + H + 2 + r     residency.backbones.kernels.decoder
    modules       4 D + 5 Q + 4 I + H + 2 + r           keys and values repeated for the queries that share them
    padded        4 D + 2 Q + 2 K + 4 I + H + 2 + r
    checkpointed  D, and one layer by modules

Of a base in parts (`engine.sharding`) a block, and what lies around the blocks, is put together while it is computed:
`Gathered` says how much of that is there at once.

The interpreter and its libraries (some 0.6 GB on a CPU) are not in it, nor what an allocator rounds up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "Blocks",
    "Gathered",
    "Held",
    "MemoryEstimate",
    "Row",
    "Way",
    "activation_bytes",
    "estimate_memory",
    "head_bytes",
]

Way = Literal["node", "modules", "padded", "checkpointed"]
"""How the layers of a model run: each as one node, as modules on a packed row, on padded rows, or computed again in
the backward pass."""

_CHUNK, _KEPT = 16_000_000, 64_000_000  # logits at a time, and kept, of residency.backbones.kernels.head
_LOGITS = 9
"""Tensors of the size of the logits that a loss on logits and a distillation loss hold together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Sizes of a decoder.

    Args:
        layers: Of it.
        hidden: D.
        feed_forward: I.
        queries: H d.
        keys: K d.
        heads: H.
        vocabulary: V.
        thin: Numbers per token between the factors of LoRA, summed over the maps of one layer.
        width: Bytes of one activation.
    """

    layers: int
    hidden: int
    feed_forward: int
    queries: int
    keys: int
    heads: int
    vocabulary: int
    thin: int = 0
    width: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The largest micro-batch.

    Args:
        tokens: N of its row, or rows times the longest of them.
        read: Positions at which the head is computed.
        targets: M.
    """

    tokens: int
    read: int
    targets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Weights that are put together from the parts of all ranks, in bytes.

    Args:
        around: What lies around the blocks: embeddings, last norm, head.
        block: The largest block.
        trained: Whether they train: then their gradients are whole, too, until every rank has its part of them.
    """

    around: int = 0
    block: int = 0
    trained: bool = False

    @property
    def beside(self) -> int:
        """Together with the activations: what the head reads (and its gradient), a block, and the next one."""
        return self.around * (1 + self.trained) + 2 * self.block

    @property
    def alone(self) -> int:
        """Without them: what is around, received and laid out; or its weights, two gradients of a table that is head as
        well, and their sum.
        """
        return self.around * (4 if self.trained else 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What is in memory whatever is computed, and what steps with it; all in bytes.

    Args:
        weights: Of the model as stored, its adapter included.
        gradients: Of all leaves that train.
        optimizer: Its state after the first step.
        largest: The largest leaf that trains.
        stepping: What the optimizer works with during a step, beyond its state.
        copies: How many copies of the leaves an optimizer step keeps: 1 where somebody transforms the update.
        kept: Copies of the leaves that live as long as the stage (before it, of the base, of a reference).
        remembered: State of each mitigation while the stage is trained.
        own_tokens: Of the largest pass that a mitigation makes by itself after a stage, with gradients; 0 = none.
        own_sums: Bytes in which such passes are summed up.
        head_trained: Whether the head is a leaf.
        logits: Whether somebody reads the logits, so that they are there as a whole.
        on_logits: Whether what reads them is a distance to a teacher's.
        gathered: What is put together while a micro-batch is computed; of weights, gradients and optimizer this
            device's part is counted then.
    """

    weights: int
    gradients: int
    optimizer: int
    largest: int
    stepping: int = 0
    copies: int = 0
    kept: int = 0
    remembered: Mapping[str, int] = field(default_factory=dict)
    own_tokens: int = 0
    own_sums: int = 0
    head_trained: bool = False
    logits: bool = False
    on_logits: bool = False
    gathered: Gathered = Gathered()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one device, by part.

    Args:
        weights: See `Held`.
        gradients: See `Held`.
        optimizer: See `Held`.
        activations: Of the largest micro-batch.
        head: Of the logits and what a loss makes of them.
        remembered: Of the mitigations, and of copies of the leaves.
        forward: Peak while a micro-batch is computed.
        step: Peak while the optimizer steps.
        finish: Peak of what follows training.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    remembered: int
    forward: int
    step: int
    finish: int

    @property
    def peak(self) -> int:
        """The largest of the three."""
        return max(self.forward, self.step, self.finish)


def activation_bytes(blocks: Blocks, row: Row, *, way: Way) -> int:
    """What a backward pass through the layers will read.

    Args:
        blocks: Sizes of the decoder.
        row: The micro-batch. The feed-forward part of the last layer keeps only what is read, where that is less than
            three quarters (`residency.backbones.kernels.last_layer`), and that layer runs by its modules.
        way: How the layers run.
    """
    upper, lower = _halves(blocks, way="modules" if way == "checkpointed" else way)
    ends = 2 * blocks.hidden + 2 * blocks.queries // max(blocks.heads, 1)  # embeddings, final norm, angles
    if way == "checkpointed":
        return blocks.width * row.tokens * (blocks.layers * blocks.hidden + upper + lower + ends)
    last = row.read if way != "padded" and row.read <= 0.75 * row.tokens else row.tokens
    first_last, second_last = _halves(blocks, way="modules") if last < row.tokens else (upper, lower)
    body = (blocks.layers - 1) * (upper + lower) * row.tokens + first_last * row.tokens + second_last * last
    return blocks.width * (body + ends * row.tokens)


def _halves(blocks: Blocks, *, way: Way) -> tuple[int, int]:
    """Numbers per token of attention and of the feed-forward part of one layer, their norms included."""
    d, q, k, i = blocks.hidden, blocks.queries, blocks.keys, blocks.feed_forward
    attention = {"node": 2 * q + 2 * k, "modules": 5 * q, "padded": 2 * q + 2 * k}[way]
    # Four of the seven maps of a layer belong to attention.
    thin = blocks.thin * 4 // 7
    upper = 2 * d + attention + blocks.heads + 1 + thin
    return upper, 2 * d + (3 if way == "node" else 4) * i + 1 + blocks.thin - thin


def head_bytes(blocks: Blocks, row: Row, *, held: Held) -> int:
    """What the head and the loss hold together with the activations."""
    logits = row.targets * blocks.vocabulary
    if held.logits:
        return 4 * logits * (_LOGITS if held.on_logits else 3)
    features = 2 * row.targets * blocks.hidden * blocks.width
    if held.head_trained and logits <= _KEPT:
        return 4 * logits + features
    return 4 * min(logits, _CHUNK) + features


def estimate_memory(blocks: Blocks, row: Row, held: Held, *, way: Way) -> MemoryEstimate:
    """Peak of a stage, by part.

    Args:
        blocks: Sizes of the decoder.
        row: The largest micro-batch.
        held: What is there whatever is computed.
        way: How the layers run.
    """
    activations, head = activation_bytes(blocks, row, way=way), head_bytes(blocks, row, held=held)
    remembered = sum(held.remembered.values()) + held.kept
    always = held.weights + remembered
    # Lightning frees the gradients of a step only behind the next forward pass.
    gathered = held.gathered
    computed = max(activations + head + gathered.beside, gathered.alone)
    forward = always + held.optimizer + held.gradients + computed
    # A table that is head as well gets its gradient in two parts.
    twice = held.largest if held.head_trained else 0
    step = always + held.optimizer + held.gradients + max(held.copies * held.gradients + held.stepping, twice)
    finish = always + held.gradients
    if held.own_tokens:
        own = Row(tokens=held.own_tokens, read=held.own_tokens, targets=held.own_tokens)
        # Gradients of single examples are made from what every map gave, which is kept besides.
        given = blocks.queries + 2 * blocks.keys + 2 * blocks.hidden + 2 * blocks.feed_forward + blocks.thin
        finish += activation_bytes(blocks, own, way="modules" if way == "node" else way) + held.own_sums
        finish += blocks.width * blocks.layers * given * held.own_tokens + gathered.beside
    return MemoryEstimate(
        weights=held.weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=activations,
        head=head,
        remembered=remembered,
        forward=forward,
        step=step,
        finish=finish,
    )
