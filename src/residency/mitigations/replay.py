"""Replay of a reservoir of earlier examples (Vitter 1985; Chaudhry et al. 2019), as a mixture in the data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from residency.domains.sampler import learned_examples
from residency.errors import UserError
from residency.mitigations.base import Mitigation
from residency.randomness import choice
from residency.types import Example, Stage

__all__ = ["Mixture", "Replay", "pack_examples", "replayed_slot", "reservoir_slot", "unpack_examples"]


def reservoir_slot(n: int, capacity: int, *, seed: int) -> int | None:
    """Where the n-th item ever seen (from 0) goes in a reservoir of `capacity` slots.

    Returns:
        A slot, or `None` if the item is not kept. After n items each is in the reservoir with probability
        min(1, capacity / n) (algorithm R, Vitter 1985).
    """
    if n < capacity:
        return n
    slot = choice(n + 1, seed, "reservoir", n)
    return slot if slot < capacity else None


def replayed_slot(position: int, ratio: float) -> bool:
    """Whether the example at a position is replaced by an old one: evenly spread, exactly `ratio` of any long run."""
    return int((position + 1) * ratio + 1e-9) > int(position * ratio + 1e-9)


class Mixture(Sequence[Example]):
    """A stage's examples with a fixed share of positions taken by old ones; a pure function of the position.

    Args:
        current: The stage's own examples by position.
        memory: Old examples, at least one.
        ratio: Share of positions that are replaced.
        stage: For the seed and the position in the stream.
    """

    def __init__(self, *, current: Sequence[Example], memory: Sequence[Example], ratio: float, stage: Stage) -> None:
        self.current = current
        self.memory = memory
        self.ratio = ratio
        self.stage = stage

    def __len__(self) -> int:
        return len(self.current)

    def __getitem__(self, position: int) -> Example:  # type: ignore[override]
        if not 0 <= position < len(self):
            raise IndexError(position)
        if not replayed_slot(position, self.ratio):
            return self.current[position]
        return self.memory[choice(len(self.memory), self.stage.seed, "replay", self.stage.index, position)]


class Replay(Mitigation):
    """Mix examples of earlier domains into every batch.

    Old examples take the place of new ones, so steps and batch size stay what they are without replay. The reservoir
    holds training examples the model has learned from, as token ids; test rows can never enter it.

    Args:
        ratio: Share of each batch that is old, in [0, 1): exact over a run, spread evenly. 0 = off.
        capacity: Examples kept over all domains.
    """

    training_only: ClassVar[frozenset[str]] = frozenset({"ratio"})

    def __init__(self, *, ratio: float = 0.25, capacity: int = 500) -> None:
        super().__init__()
        if not 0 <= ratio < 1 or capacity < 1:
            raise UserError(
                f"Replay with ratio={ratio}, capacity={capacity}",
                why="the ratio is the share of old examples in a batch, in [0, 1); the capacity is at least 1",
                fix="for 25 % replay give ratio: 0.25",
            )
        self.ratio = ratio
        self.capacity = capacity
        self.add_state("seen", torch.zeros((), dtype=torch.long))
        self.add_state("buffer", pack_examples([]))

    def transform_dataset(self, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """Replace evenly spread positions by draws from the reservoir."""
        memory = self.memory()
        if not memory or self.ratio == 0:
            return dataset
        return Mixture(current=dataset, memory=memory, ratio=self.ratio, stage=stage)

    def on_domain_end(self, module: object, stage: Stage) -> None:
        """Offer every example the domain was learned from to the reservoir, in order of appearance."""
        memory, seen = self.memory(), self.state["seen"]
        assert isinstance(seen, Tensor)
        n = int(seen)
        dataset: Sequence[Example] = module.dataset  # type: ignore[attr-defined]
        for example in learned_examples(dataset, stage.domain):
            slot = reservoir_slot(n, self.capacity, seed=stage.seed)
            n += 1
            if slot is not None:
                memory[slot : slot + 1] = [example]
        self.state.update(seen=torch.tensor(n), buffer=pack_examples(memory))

    def touches_training(self, index: int) -> bool:
        """Not at ratio 0."""
        return self.ratio > 0 and super().touches_training(index)

    def memory(self) -> list[Example]:
        """The examples in the reservoir, slot by slot."""
        buffer = self.state["buffer"]
        assert isinstance(buffer, dict)
        return unpack_examples(buffer)


def pack_examples(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Examples as tensors: `tokens` (all ids), `lengths` (n, 2) of prompt and completion, `origin` (UTF-8 JSON)."""
    tokens = [token for e in examples for token in (*e.prompt, *e.completion)]
    lengths = [[len(e.prompt), len(e.completion)] for e in examples]
    origin = json.dumps([[e.domain, e.row] for e in examples]).encode()
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
    for (prompt, completion), (domain, row) in zip(packed["lengths"].tolist(), origin, strict=True):
        middle, end = start + prompt, start + prompt + completion
        ids = {"prompt": tuple(tokens[start:middle]), "completion": tuple(tokens[middle:end])}
        examples.append(Example(domain=domain, row=row, **ids))
        start = end
    return examples
