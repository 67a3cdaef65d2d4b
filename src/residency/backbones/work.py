"""How much is computed: tokens and FLOPs of every pass through a model, whoever asks for it.

A product of n positions with a weight of p numbers is 2 n p FLOPs: once forward, once for the gradient of its input
where that has one, once for the gradient of the weight where it is trained. Attention between n positions is
4 n² FLOPs per layer and unit of width forward, and two and a half times as many backward (the scores are computed
again), as `torch.utils.flop_counter` counts it. The head is a product at the positions that are read. Left out are
norms, activations, decompositions, the step of the optimizer, and what is done with weights alone (mixing, DoRA). What
is done with statistics of activations is told by whoever does it (`Work.multiplied`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from residency.backbones.kernels.last_layer import is_trimmed, trimmed_part
from residency.backbones.structure import blocks
from residency.core.errors import UserError
from residency.core.types import Batch, segment_tokens

__all__ = ["Products", "Work", "is_checkpointed", "products_of"]

T = TypeVar("T")

# Maps that read what enters a block; of the lowest block that trains, this has no gradient.
_READS_INPUT = re.compile(r"\.([qkv]_proj|query|key|value|qkv_proj|query_key_value|c_attn|Wqkv)\.(?!.*lora_B)")
# What may train outside of the blocks without a gradient that passes through them.
_ABOVE = re.compile(r"norm|ln_f|lm_head|embed_out|\b(score|classifier|pre_classifier|pooler)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """Numbers of weights, by what is computed with them.

    Args:
        weights: Of all products that every position of a row passes.
        passed: Of these, those whose input gets a gradient.
        trained: Of these, those that get one.
        last: Of the feed-forward part of the last layer, where it runs at the positions that are read only.
        last_trained: Of these, those that train.
        head: Of the head.
        head_trained: Whether it trains.
        attention: Width of queries, summed over layers.
        again: Of the blocks that the backward pass computes again under gradient checkpointing.
    """

    weights: int
    passed: int
    trained: int
    last: int
    last_trained: int
    head: int
    head_trained: bool
    attention: int
    again: int

    def forward(self, *, positions: int, read: int, pairs: int, last: int) -> int:
        """FLOPs of a forward pass.

        Args:
            positions: In its rows, padding included.
            read: At how many of them the head is computed.
            pairs: Of positions for which attention is computed, in one layer.
            last: Positions in the feed-forward part of the last layer.
        """
        body = 2 * (self.weights - self.last) * positions + 2 * self.last * last
        return body + 2 * self.head * read + 4 * self.attention * pairs

    def backward(self, *, positions: int, read: int, pairs: int, last: int, checkpointed: bool) -> int:
        """FLOPs of a backward pass, with what it computes again; arguments as for `forward`."""
        some = (self.passed - self.last) + (self.trained - self.last_trained)
        body = 2 * some * positions + 2 * (self.last + self.last_trained) * last
        again = 2 * self.again * positions + 4 * self.attention * pairs if checkpointed else 0
        return body + 2 * self.head * (1 + self.head_trained) * read + 10 * self.attention * pairs + again


def products_of(model: nn.Module) -> Products:
    """What a model computes with, as it is: its adapter attached, and what trains marked."""
    sizes = _config(model)
    head = _head(model)
    sized = _weights(model, head, share=_active_experts(sizes))
    trains = {name for name, p in model.named_parameters() if p.requires_grad and name in sized}
    stack = _stack(model)
    block = _blocks_of(sized, stack)
    lowest = _lowest(model, stack)
    reached = {name for name in sized if block[name] >= max(lowest, 0) or not stack or lowest < 0}
    passed = {name for name in reached if block[name] != lowest or not _READS_INPUT.search(name)}
    # What a block ends with is not computed again: torch stops behind the last product whose input is needed.
    ends = {number: name for name, number in block.items() if number >= 0}.values()
    trimmed = trimmed_part(model)
    in_trimmed = {id(p) for p in trimmed.parameters()} if trimmed is not None else set()
    last = {name for name, p in model.named_parameters() if id(p) in in_trimmed and name in sized}

    def total(names: Iterable[str]) -> int:
        return round(sum(sized[name] for name in names))

    heads, layers = getattr(sizes, "num_attention_heads", 0), getattr(sizes, "num_hidden_layers", 0)
    width = getattr(sizes, "head_dim", None) or (getattr(sizes, "hidden_size", 0) // max(heads, 1))
    return Products(
        weights=total(sized),
        passed=total(passed),
        trained=total(trains),
        last=total(last),
        last_trained=total(last & trains),
        head=0 if head is None else _size(head),
        head_trained=head is not None and head.requires_grad,
        attention=heads * width * layers,
        again=total(name for name in reached if block[name] >= 0 and name not in ends),
    )


def _config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _head(model: nn.Module) -> Tensor | None:
    head_of: Any = getattr(model, "get_output_embeddings", None)
    return getattr(head_of() if head_of else None, "weight", None)


def _weights(model: nn.Module, head: Tensor | None, *, share: float) -> dict[str, float]:
    """Numbers of the weights that a position is multiplied with; tables are only looked up."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return {
        name: _size(p) * (share if "experts" in name else 1)
        for name, p in model.named_parameters()
        if p.ndim > 1 and id(p) not in tables and p is not head
    }


def _blocks_of(names: Iterable[str], stack: Sequence[str]) -> dict[str, int]:
    """Name -> the number of its block; -1 = it lies in none."""
    numbers = {block: k for k, block in enumerate(stack)}
    stem = stack[0].rpartition(".")[0] + "." if stack else ""

    def number(name: str) -> int:
        at, _, _ = name.removeprefix(stem).partition(".")
        return numbers.get(f"{stem}{at}", -1) if stem and name.startswith(stem) else -1

    return {name: number(name) for name in names}


def _size(parameter: Tensor) -> int:
    """Numbers in a weight; a 4-bit one is stored as bytes of two."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else int(shape.numel())


def _active_experts(sizes: Any) -> float:
    """Of a mixture of experts, the share that a token passes."""
    chosen = getattr(sizes, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((n for name in names if (n := getattr(sizes, name, None))), None)
    return chosen / total if chosen and total else 1.0


def _stack(model: nn.Module) -> list[str]:
    try:
        return list(blocks(model))
    except UserError:
        return []


def _lowest(model: nn.Module, stack: Sequence[str]) -> int:
    """The lowest block whose weights train; -1 = what enters the blocks has a gradient, too."""
    blocks_of = _blocks_of([name for name, p in model.named_parameters() if p.requires_grad], stack)
    table_of: Any = getattr(model, "get_input_embeddings", None)
    # Under gradient checkpointing PEFT hooks into the embeddings, so that their output has a gradient.
    hooked = blocks_of and table_of is not None and table_of()._forward_hooks
    if hooked or any(number < 0 and not _ABOVE.search(name) for name, number in blocks_of.items()):
        return -1
    return min((number for number in blocks_of.values() if number >= 0), default=len(stack))


class Work:
    """Counts what a model computes until it is taken; the backbone tells it of every pass."""

    def __init__(self) -> None:
        self._tokens = self._flops = 0
        self._products: Products | None = None
        self._last: Callable[..., int] = lambda **place: 0
        self._known: Any = None
        self._trimmed: nn.Module | None = None
        self._checkpointed = False

    def take(self) -> tuple[int, int]:
        """(tokens, FLOPs) since the last time. A token counts once per forward pass that it is in."""
        found = self._tokens, self._flops
        self._tokens = self._flops = 0
        return found

    def renew(self) -> None:
        """Look at the model again: something was attached to it, or something else trains."""
        self._products = self._known = None

    def known(self, model: nn.Module, look: Callable[[nn.Module], T]) -> T:
        """What a look at the model finds, looked up once until `renew`."""
        if self._known is None:
            self._known = look(model)
        found: T = self._known
        return found

    def passed(self, model: nn.Module, batch: Batch, out: Tensor) -> None:
        """A forward pass over a batch.

        Args:
            model: With its adapter.
            batch: As it ran.
            out: What came out: each backward pass through it counts, too.
        """
        products = self._look_at(model)
        place = self._place(batch)
        self._add(batch.tokens, products.forward(**place))
        again = model.training and self._checkpointed
        self._last = partial(products.backward, **place, checkpointed=again)
        if out.requires_grad:
            out.register_hook(partial(self._back, self._last()))

    def through(self, hidden: Tensor) -> Tensor:
        """What the last pass found in front of its head, for a backward pass that begins there; the same tensor."""
        if hidden.requires_grad:
            hidden.register_hook(partial(self._back, self._last(read=0)))
        return hidden

    def wrote(
        self, model: nn.Module, prompts: Sequence[int], answers: Sequence[Sequence[int]], *, padded: bool = False
    ) -> None:
        """A generation that reads every prompt once and then token by token what it wrote.

        Args:
            model: With its adapter.
            prompts: Tokens of each prompt.
            answers: Per prompt the tokens of each of its answers; the last token of an answer is not read.
            padded: All rows are as long as the longest, and go on until it ends: FLOPs, and no tokens.
        """
        products = self._look_at(model)
        tokens = sum(prompts) + sum(max(n - 1, 0) for group in answers for n in group)
        if padded:
            longest = max((n for group in answers for n in group), default=0)
            prompts, answers = [max(prompts)] * len(prompts), [[longest] * len(group) for group in answers]
        read = sum(prompts)
        steps = [(p, max(n - 1, 0)) for p, group in zip(prompts, answers, strict=True) for n in group]
        written = sum(n for _, n in steps)
        pairs = sum(p * p for p in prompts) + sum(n * p + n * (n + 1) // 2 for p, n in steps)
        first = products.forward(positions=read, read=len(prompts), pairs=pairs, last=read)
        self._add(tokens, first + products.forward(positions=written, read=written, pairs=0, last=written))

    def multiplied(self, flops: int) -> None:
        """Products of statistics that no token passes: covariances, projections."""
        self._flops += flops

    def counted(self, *, tokens: int, forward: int, backward: int, out: Tensor | None = None) -> None:
        """A pass that its backbone has counted by itself.

        Args:
            tokens: That are no padding.
            forward: FLOPs.
            backward: FLOPs of each backward pass through `out`.
            out: What came out; `None` = nothing that could have a gradient.
        """
        self._add(tokens, forward)
        if out is not None and out.requires_grad:
            out.register_hook(partial(self._back, backward))

    def _add(self, tokens: int, flops: int) -> None:
        self._tokens += tokens
        self._flops += flops

    def _back(self, flops: int, gradient: Tensor) -> None:
        self._flops += flops

    def _look_at(self, model: nn.Module) -> Products:
        if self._products is None:
            self._products, self._trimmed = products_of(model), trimmed_part(model)
            self._checkpointed = is_checkpointed(model)
        return self._products

    def _place(self, batch: Batch) -> dict[str, int]:
        rows, columns = batch.input_ids.shape
        positions = rows * columns
        if batch.layout == "padded":
            read = rows * len((batch.target_at % columns).unique())
            return {"positions": positions, "read": read, "pairs": rows * columns**2, "last": positions}
        pairs = sum(segment_tokens(segment) ** 2 for segment in batch.segments)
        at = len(batch.target_at.unique())
        cut = self._trimmed is not None and is_trimmed(self._trimmed, positions=positions, read=at)
        last = at if cut else positions
        return {"positions": positions, "read": len(batch.target_at), "pairs": pairs, "last": last}


def is_checkpointed(model: nn.Module) -> bool:
    """Whether training computes the blocks again in its backward pass."""
    # `is_activation_checkpointing` of transformers asks every module by its `__getattr__`: 11 ms where this takes 1.
    return any(vars(part).get("gradient_checkpointing", False) for part in model.modules())
