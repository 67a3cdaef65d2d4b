"""Views of a stage's examples by position. Pure: an example is made when it is asked for, and remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from residency.core.batching import by_token_budget
from residency.core.types import Batch, Example, ExampleView
from residency.domains.sampler import name_at
from residency.objectives.base import Learner, Objective, Was

__all__ = [
    "Mapped",
    "Repeated",
    "branch_sums",
    "branch_weights",
    "distinct",
    "example_sums",
    "own_rows",
    "token_values",
]

PASS_TOKENS = 2048  # without gradients memory is no question


class Mapped(ExampleView):
    """Every example replaced by what a function makes of it.

    Args:
        dataset: Position -> example.
        function: Example -> example; called once for each distinct one.
    """

    def __init__(self, dataset: Sequence[Example], function: Callable[[Example], Example]) -> None:
        self.dataset = dataset
        self.function = function
        self._made: dict[Example, Example] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def at(self, position: int) -> Example:
        example = self.dataset[position]
        if example not in self._made:
            self._made[example] = self.function(example)
        return self._made[example]

    def name_at(self, position: int) -> tuple[str, str]:
        return name_at(self.dataset, position)


class Repeated(ExampleView):
    """Every global batch several times in a row, in place of those that would have followed it.

    Args:
        dataset: Position (step · batch size + slot) -> example.
        times: How often.
        batch_size: Of a global batch.
    """

    def __init__(self, dataset: Sequence[Example], *, times: int, batch_size: int) -> None:
        self.dataset = dataset
        self.times = times
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.dataset)

    def at(self, position: int) -> Example:
        return self.dataset[self._of(position)]

    def name_at(self, position: int) -> tuple[str, str]:
        return name_at(self.dataset, self._of(position))

    def _of(self, position: int) -> int:
        if not 0 <= position < len(self):
            raise IndexError(position)
        step, slot = divmod(position, self.batch_size)
        return step // self.times * self.batch_size + slot


def distinct(dataset: Sequence[Example]) -> list[Example]:
    """Every example once, in order of first appearance."""
    return list(dict.fromkeys(dataset[position] for position in range(len(dataset))))


def own_rows(dataset: Sequence[Example], domain: str) -> list[Example]:
    """Every example of a stage's domain once, those too whose places rehearsal has taken.

    What is said of a domain as a whole (its labels, its balance) must not hang on which places a replay takes.
    """
    whole = dataset.own() if isinstance(dataset, ExampleView) else dataset
    return [example for example in distinct(whole) if example.domain == domain]


def token_values(
    learner: Learner, objective: Objective, examples: Iterable[Example], *, when: Was
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches with the (M,) nats of their targets, float64, under the model as it was; dropout off, no gradient."""
    with learner.as_it_was(when):
        for group in by_token_budget(sorted(examples, key=len), tokens=PASS_TOKENS):
            batch = objective.collate(group, layout=learner.layout).to(learner.device)
            yield batch, learner.backbone.nll(learner.model, batch).double()


def branch_sums(values: Tensor, batch: Batch) -> Tensor:
    """(B, K) sums over each branch's targets, K the most branches of an example; 0 where there is none.

    Args:
        values: (M,) one value per target.
        batch: B examples.
    """
    most = max(len(example.branches) for example in batch.examples)
    at = batch.target_example * most + batch.target_branch
    sums = torch.zeros(batch.size * most, dtype=values.dtype, device=values.device)
    return sums.index_add(0, at, values).view(batch.size, most)


def branch_weights(batch: Batch) -> Tensor:
    """(B, K) the weight of each branch, K the most branches of an example; 0 where there is none."""
    most = max(len(example.branches) for example in batch.examples)
    rows = [[b.weight for b in e.branches] + [0.0] * (most - len(e.branches)) for e in batch.examples]
    return torch.tensor(rows, device=batch.targets.device)


def example_sums(values: Tensor, batch: Batch) -> Tensor:
    """(B,) sums of (M,) values over each example's targets."""
    sums = torch.zeros(batch.size, dtype=values.dtype, device=values.device)
    return sums.index_add(0, batch.target_example, values)
