"""A memory of examples as tensors, how new ones come in, and how old ones come back. Pure functions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.randomness import choice
from residency.core.types import Branch, Example, ExampleView, Stage
from residency.domains.sampler import name_at
from residency.mitigations.rehearsal.selection import drawn, fair_quotas, reservoir_slot

__all__ = [
    "Mixture",
    "Source",
    "fair_memory",
    "into_reservoir",
    "mixed_in",
    "pack_examples",
    "replayed_position",
    "replayed_slot",
    "source_of",
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
    place = _counted(position, every=every, batch_size=batch_size)
    return place is not None and replayed_slot(place, ratio)


def _counted(position: int, *, every: int, batch_size: int) -> int | None:
    """The place of a position among those of every k-th batch; `None` in the batches in between."""
    step, slot = divmod(position, batch_size)
    return None if (step + 1) % every else step // every * batch_size + slot


def source_of(place: int, ratios: Sequence[float]) -> int | None:
    """Which of several rehearsals has a place: each its own ratio of any long run, to within one.

    Args:
        place: Counted over the batches that hold old examples.
        ratios: ρ_i > 0, their sum at most 1.

    Returns:
        Its number, or `None` where the place is that of a new example.
    """
    total = sum(ratios)
    if not replayed_slot(place, total):
        return None
    k = int((place + 1) * total + 1e-9) - 1  # of the rehearsed places, this is the k-th
    for i in range(len(ratios) - 1, 0, -1):
        share = ratios[i] / sum(ratios[: i + 1])
        before = int((k + 1) * share + 1e-9)
        if replayed_slot(k, share):
            return i
        k -= before
    return 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """One rehearsal of a mixture.

    Args:
        name: Of the mitigation; its draws are its own.
        memory: Old examples, at least one.
        ratio: Share of positions that it takes.
        sums: Running sums of the weights with which old examples are drawn; `None` = all alike.
    """

    name: str
    memory: Sequence[Example]
    ratio: float
    sums: Sequence[float] | None = None

    def draw(self, stage: Stage, position: int) -> Example:
        """The old example at a position."""
        words = ("replay", self.name, stage.index, position)
        if self.sums is None:
            return self.memory[choice(len(self.memory), stage.seed, *words)]
        return self.memory[drawn(self.sums, stage.seed, *words)]


class Mixture(ExampleView):
    """A stage's examples with fixed shares of positions taken by old ones; a pure function of the position.

    Args:
        current: The stage's own examples by position.
        sources: What takes their place. Ratios add: no source takes a place that another one has.
        stage: For the seed, the position in the stream and the batch size.
        every: Replace in every k-th batch only.
    """

    def __init__(self, *, current: Sequence[Example], sources: Sequence[Source], stage: Stage, every: int = 1) -> None:
        self.current = current
        self.sources = tuple(sources)
        self.stage = stage
        self.every = every

    def __len__(self) -> int:
        return len(self.current)

    def source(self, position: int) -> Source | None:
        """Whose a position is; `None` = a new example's."""
        place = _counted(position, every=self.every, batch_size=self.stage.batch_size)
        chosen = None if place is None else source_of(place, [source.ratio for source in self.sources])
        return None if chosen is None else self.sources[chosen]

    def at(self, position: int) -> Example:
        if not 0 <= position < len(self):
            raise IndexError(position)
        source = self.source(position)
        return self.current[position] if source is None else source.draw(self.stage, position)

    def name_at(self, position: int) -> tuple[str, str]:
        return name_at(self.current, position) if self.source(position) is None else super().name_at(position)

    def own(self) -> Sequence[Example]:
        return self.current.own() if isinstance(self.current, ExampleView) else self.current


def kept_rows(examples: Iterable[Example]) -> dict[str, int]:
    """{domain: how many distinct rows of it} are among some examples."""
    return dict(Counter(domain for domain, _ in {(e.domain, e.row) for e in examples}))


def mixed_in(current: Sequence[Example], source: Source, *, stage: Stage, every: int = 1) -> Mixture:
    """A data set with one more rehearsal; where it is a mixture already, their ratios add."""
    if isinstance(current, Mixture):
        return Mixture(current=current.current, sources=(*current.sources, source), stage=stage, every=every)
    return Mixture(current=current, sources=(source,), stage=stage, every=every)


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
        extra = shape.pop(0) if shape and isinstance(shape[0], dict) else None
        shape = shape if shape or extra is not None else [[rest, [], "completion", 1.0, None]]
        branches, extra = _branches(tokens[middle:end], shape), extra or {}
        asked = tuple(tokens[start:middle])
        examples.append(Example(domain=domain, row=row, prompt=asked, branches=branches, extra=extra))
        start = end
    return examples


def _shape(example: Example) -> list[Any]:
    """(length, unsupervised places, role, weight, reference) per branch; nothing for one plain completion. Columns for
    a reward, and that there is no branch, are told by a mapping before them.
    """
    if example.branches == (Branch(tokens=example.completion),) and not example.extra:
        return []
    shapes: list[Any] = [dict(example.extra)] if example.extra or not example.branches else []
    for branch in example.branches:
        hidden = [k for k, on in enumerate(branch.mask) if not on]
        shapes.append([len(branch.tokens), hidden, branch.role, branch.weight, branch.reference])
    return shapes


def _branches(tokens: Sequence[int], shapes: Sequence[Sequence[Any]]) -> tuple[Branch, ...]:
    """The inverse of `_shape`, given the tokens of all branches."""
    found, start = [], 0
    for length, hidden, role, weight, reference in shapes:
        mask = tuple(k not in {*hidden} for k in range(length)) if hidden else ()
        own = tuple(tokens[start : start + length])
        found.append(Branch(tokens=own, mask=mask, role=role, weight=weight, reference=reference))
        start += length
    return tuple(found)
