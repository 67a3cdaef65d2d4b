"""A memory of examples as tensors, how new ones come in, and how old ones come back. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.randomness import choice
from residency.core.types import Branch, Example, ExampleView, Stage
from residency.mitigations.rehearsal.selection import drawn, fair_quotas, reservoir_slot

__all__ = [
    "Mixture",
    "fair_memory",
    "into_reservoir",
    "pack_examples",
    "replayed_position",
    "replayed_slot",
    "unpack_examples",
]


_Item = TypeVar("_Item")


def into_reservoir(
    memory: Sequence[_Item], new: Sequence[_Item], *, seen: int, capacity: int, seed: int
) -> list[_Item]:
    """A reservoir after more items were offered to it, in order.

    Args:
        memory: What it holds, slot by slot.
        new: What is offered.
        seen: Items offered before.
        capacity: Slots.
        seed: Of the run.
    """
    kept = list(memory)
    for n, item in enumerate(new, start=seen):
        slot = reservoir_slot(n, capacity, seed=seed)
        if slot is not None:
            kept[slot : slot + 1] = [item]
    return kept


def fair_memory(
    memory: Sequence[Example],
    new: Sequence[Example],
    *,
    capacity: int,
    rank: Callable[[int], Sequence[Example]],
) -> list[Example]:
    """A memory with as many examples of each domain as of any other, after one more domain.

    Args:
        memory: Ranked examples of each earlier domain, oldest domain first.
        new: All examples of the new domain.
        capacity: Examples that may be kept together.
        rank: The best n of the new ones, best first.
    """
    blocks: dict[str, list[Example]] = {}
    for example in memory:
        blocks.setdefault(example.domain, []).append(example)
    *old, own = fair_quotas([*map(len, blocks.values()), len(new)], capacity)
    kept = [example for block, quota in zip(blocks.values(), old, strict=True) for example in block[:quota]]
    return [*kept, *(rank(own) if own else [])]


def replayed_slot(position: int, ratio: float) -> bool:
    """Whether the example at a position is replaced by an old one: evenly spread, exactly `ratio` of any long run."""
    return int((position + 1) * ratio + 1e-9) > int(position * ratio + 1e-9)


def replayed_position(position: int, *, ratio: float, every: int, batch_size: int) -> bool:
    """`replayed_slot` in every k-th batch alone: the batches in between hold nothing old, and are not counted."""
    step, slot = divmod(position, batch_size)
    if (step + 1) % every:
        return False
    return replayed_slot(step // every * batch_size + slot, ratio)


class Mixture(ExampleView):
    """A stage's examples with a fixed share of positions taken by old ones; a pure function of the position.

    Args:
        current: The stage's own examples by position.
        memory: Old examples, at least one.
        ratio: Share of positions that are replaced.
        stage: For the seed, the position in the stream and the batch size.
        every: Replace in every k-th batch only.
        sums: Running sums of the weights with which old examples are drawn; `None` = all alike.
    """

    def __init__(
        self,
        *,
        current: Sequence[Example],
        memory: Sequence[Example],
        ratio: float,
        stage: Stage,
        every: int = 1,
        sums: Sequence[float] | None = None,
    ) -> None:
        self.current = current
        self.memory = memory
        self.ratio = ratio
        self.stage = stage
        self.every = every
        self.sums = sums

    def __len__(self) -> int:
        return len(self.current)

    def at(self, position: int) -> Example:
        if not 0 <= position < len(self):
            raise IndexError(position)
        size = self.stage.batch_size
        if not replayed_position(position, ratio=self.ratio, every=self.every, batch_size=size):
            return self.current[position]
        words = ("replay", self.stage.index, position)
        if self.sums is None:
            return self.memory[choice(len(self.memory), self.stage.seed, *words)]
        return self.memory[drawn(self.sums, self.stage.seed, *words)]


def pack_examples(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Examples as tensors: `tokens` (all ids), `lengths` (n, 2) of prompt and branches, `origin` (UTF-8 JSON).

    `origin` names domain and row, and, where an example is more than one wholly supervised completion, its branches.

    Raises:
        UserError: One of them comes from another split than `train`: what is kept is trained on.
    """
    for example in examples:
        if example.split != "train":
            raise UserError(
                f"row {example.row!r} of the {example.split} split of {example.domain!r} was to be kept for replay",
                why="what is kept is trained on, and the scores of that row would measure what was memorised",
                fix="give mitigations training rows only (data.examples, not data.evaluation_examples)",
            )
    examples = [e.alone() if e.branches[1:] and e.branches[1].role == "label" else e for e in examples]
    tokens = [token for e in examples for part in (e.prompt, *(b.tokens for b in e.branches)) for token in part]
    lengths = [[len(e.prompt), len(e) - len(e.prompt)] for e in examples]
    origin = json.dumps([[e.domain, e.row, *_shape(e)] for e in examples]).encode()
    return {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "lengths": torch.tensor(lengths, dtype=torch.int32).reshape(-1, 2),
        "origin": torch.tensor(list(origin), dtype=torch.uint8),
    }


def unpack_examples(packed: dict[str, Tensor]) -> list[Example]:
    """The inverse of `pack_examples`."""
    tokens = packed["tokens"].tolist()
    origin = json.loads(bytes(packed["origin"].tolist()))
    examples, start = [], 0
    for (prompt, rest), (domain, row, *shape) in zip(packed["lengths"].tolist(), origin, strict=True):
        middle, end = start + prompt, start + prompt + rest
        branches = _branches(tokens[middle:end], shape or [[rest, [], "completion", 1.0]])
        examples.append(Example(domain=domain, row=row, prompt=tuple(tokens[start:middle]), branches=branches))
        start = end
    return examples


def _shape(example: Example) -> list[Any]:
    """(length, unsupervised places, role, weight) per branch; nothing for one wholly supervised completion."""
    if example.branches == (Branch(tokens=example.completion),):
        return []
    shapes = []
    for branch in example.branches:
        hidden = [k for k, on in enumerate(branch.mask) if not on]
        shapes.append([len(branch.tokens), hidden, branch.role, branch.weight])
    return shapes


def _branches(tokens: Sequence[int], shapes: Sequence[Sequence[Any]]) -> tuple[Branch, ...]:
    """The inverse of `_shape`, given the tokens of all branches."""
    found, start = [], 0
    for length, hidden, role, weight in shapes:
        mask = tuple(k not in {*hidden} for k in range(length)) if hidden else ()
        own = tuple(tokens[start : start + length])
        found.append(Branch(tokens=own, mask=mask, role=role, weight=weight))
        start += length
    return tuple(found)
