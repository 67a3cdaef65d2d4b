"""Which example a training step sees: a pure function of (seed, stage, position)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import Sampler

from residency.core.randomness import permutation
from residency.core.types import Example, ExampleView, GlobalBatch, Stage
from residency.domains.augmentation.base import may_be_kept

__all__ = [
    "StageBatches",
    "StageExamples",
    "StepParts",
    "count_learned",
    "learned_examples",
    "name_at",
    "rememberable_examples",
]


class StageExamples(ExampleView):
    """The examples of one stage by position (step * batch size + slot): shuffled epochs, one after another.

    Args:
        rows: Number of training rows.
        encode: Row index -> example; called when a position is read.
        stage: Seed, place in the stream, steps and batch size.
        names: Row index -> `Row.id`; `None` = the example is made to know it.
    """

    def __init__(
        self, *, rows: int, encode: Callable[[int], Example], stage: Stage, names: Callable[[int], str] | None = None
    ) -> None:
        self.rows = rows
        self.encode = encode
        self.stage = stage
        self.names = names

    def __len__(self) -> int:
        return self.stage.steps * self.stage.batch_size

    def at(self, position: int) -> Example:
        return self.encode(self._index(position))

    def name_at(self, position: int) -> tuple[str, str]:
        if self.names is None:
            return super().name_at(position)
        return self.stage.domain, self.names(self._index(position))

    def _index(self, position: int) -> int:
        if not 0 <= position < len(self):
            raise IndexError(position)
        epoch, at = divmod(position, self.rows)
        # The domain's name, not its place, orders its rows: "A then B" and "B then A" see A's rows in the same order.
        return permutation(self.rows, self.stage.seed, "order", self.stage.domain, epoch)[at]


class StageBatches(Sampler[list[int]]):
    """Positions of each micro-batch of one rank, from any step on.

    A resume starts at the micro-batch after the last one that counted; nothing has to be replayed or remembered.

    Args:
        stage: Steps and batch size.
        micro_batch: Examples per forward pass on one device; divides the batch size times the ranks.
        start: Micro-batches that are already done.
        rank: This process.
        ranks: All processes.
    """

    def __init__(self, *, stage: Stage, micro_batch: int, start: int = 0, rank: int = 0, ranks: int = 1) -> None:
        self.stage = stage
        self.micro_batch = micro_batch
        self.start = start
        self.rank = rank
        self.ranks = ranks

    @property
    def per_step(self) -> int:
        """Micro-batches per optimizer step and rank."""
        return self.stage.batch_size // (self.micro_batch * self.ranks)

    def __len__(self) -> int:
        # The whole stage, also after a resume: Lightning counts what was done before against it.
        return self.stage.steps * self.per_step

    def __iter__(self) -> Iterator[list[int]]:
        for micro in range(self.start, len(self)):
            first = (micro * self.ranks + self.rank) * self.micro_batch
            yield list(range(first, first + self.micro_batch))


class StepParts:
    """Micro-batches of a stage, each with the global batch that it is a part of. For a torch `DataLoader`.

    Args:
        dataset: The stage's examples by position (step * batch size + slot).
        stage: For the batch size.
        parts: Micro-batches per step, over all devices.
    """

    def __init__(self, *, dataset: Sequence[Example], stage: Stage, parts: int) -> None:
        self.dataset = dataset
        self.stage = stage
        self.parts = parts
        self._step: tuple[int, tuple[Example, ...]] = (-1, ())

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, positions: list[int]) -> GlobalBatch:
        """The global batch that these positions of one step are in, with their slots."""
        size = self.stage.batch_size
        step = positions[0] // size
        if self._step[0] != step:  # the parts of a step come one after another
            whole = tuple(self.dataset[p] for p in range(step * size, (step + 1) * size))
            self._step = (step, whole)
        slots = tuple(p - step * size for p in positions)
        return GlobalBatch(examples=self._step[1], slots=slots, parts=self.parts)


def name_at(dataset: Sequence[Example], position: int) -> tuple[str, str]:
    """(domain, row) of the example at a position."""
    if isinstance(dataset, ExampleView):
        return dataset.name_at(position)
    example = dataset[position]
    return example.domain, example.row


def count_learned(dataset: Sequence[Example], domain: str, *, positions: int) -> int:
    """How many distinct rows of a domain are among the first positions: those that some batch had."""
    names = {name_at(dataset, position) for position in range(positions)}
    return sum(of == domain for of, _ in names)


def rememberable_examples(dataset: Sequence[Example], domain: str) -> list[Example]:
    """Those of `learned_examples` that a memory may keep: no rows that an augmentation made, unless it says so."""
    return [example for example in learned_examples(dataset, domain) if may_be_kept(example)]


def learned_examples(dataset: Sequence[Example], domain: str) -> list[Example]:
    """The distinct examples of a domain that a stage trains on, in order of first appearance."""
    found: dict[str, Example] = {}
    for position in range(len(dataset)):
        example = dataset[position]
        if example.domain == domain:
            found.setdefault(example.row, example)
    return list(found.values())
