"""Log-probabilities of a stage's rows under the policy it starts from: one pass before its first step, kept on rows.

The reference does not move, so nothing else is needed in the loss: no second model, no second pass per batch. A row
that is replayed in a later stage keeps the value with which it was learnt: the loss replayed is the one that was
trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from residency.core.types import Batch, Example
from residency.objectives.base import Forward, Learner, Objective, Was, target_nll
from residency.objectives.dataset import Mapped, branch_sums, distinct, token_values

__all__ = ["reference_sums", "with_reference"]


def with_reference(
    learner: Learner, objective: Objective, dataset: Sequence[Example], *, when: Was
) -> Sequence[Example]:
    """The same rows, each branch with its log-probability; what has one already keeps it.

    Args:
        learner: The module, before the first step of a stage.
        objective: Lays rows out.
        dataset: Position -> example.
        when: `now`, at the start of the stage, or `pretrained`.
    """
    bare = [e for e in distinct(dataset) if any(branch.reference is None for branch in e.branches)]
    known: dict[Example, Example] = {}
    for batch, nll in token_values(learner, objective, bare, when=when):
        sums = (-branch_sums(nll, batch)).float().tolist()
        for example, own in zip(batch.examples, sums, strict=True):
            values = zip(example.branches, own, strict=False)
            known[example] = replace(example, branches=tuple(replace(b, reference=v) for b, v in values))
    return Mapped(dataset, lambda example: known.get(example, example))


def reference_sums(batch: Batch, reference: Forward | None) -> Tensor | None:
    """(B, K) log-probability of each branch under the reference: as the rows have it, else from a pass.

    Args:
        batch: B examples.
        reference: A pass without gradient for rows that nobody has asked about; `None` = there is none.
    """
    given = [[branch.reference for branch in example.branches] for example in batch.examples]
    if all(value is not None for row in given for value in row):
        most = max(map(len, given))
        rows = [[v for v in row if v is not None] + [0.0] * (most - len(row)) for row in given]
        return torch.tensor(rows, dtype=torch.float32, device=batch.targets.device)
    if reference is None:
        return None
    with torch.no_grad():
        return -branch_sums(target_nll(reference, batch)[0], batch)
