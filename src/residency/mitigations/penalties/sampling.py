"""Which examples a finished domain is judged by, and in which batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from residency.core.batching import by_token_budget, make_batch
from residency.core.errors import UserError
from residency.core.randomness import permutation
from residency.core.types import Batch, Example, Stage
from residency.domains.sampler import learned_examples
from residency.mitigations.contract import StageModule
from residency.mitigations.penalties.fisher import completions

__all__ = ["batches_of", "lay_out", "pack_facts", "sample_examples", "stage_labels", "unpack_facts"]

MOST_LABELS = 64


def sample_examples(module: StageModule, stage: Stage, *, count: int) -> list[Example]:
    """Up to `count` distinct examples of the domain, of those that the stage learned from, as its objective judges by
    them; drawn by the run's seed.
    """
    examples = learned_examples(module.dataset, stage.domain)
    order = permutation(len(examples), stage.seed, "fisher", stage.index)
    return module.objective.judged(module, [examples[i] for i in order[:count]])


def lay_out(module: StageModule, examples: Sequence[Example]) -> Batch:
    """One batch as the model reads it, on its device."""
    return make_batch(examples, layout=module.layout).to(module.device)


def batches_of(module: StageModule, examples: Iterable[Example], *, tokens: int) -> Iterator[Batch]:
    """Batches of at most so many tokens (an example that is longer is a batch by itself)."""
    for group in by_token_budget(examples, tokens=tokens):
        yield lay_out(module, group)


def stage_labels(module: StageModule, stage: Stage, *, asked_by: str) -> list[tuple[int, ...]]:
    """The labels of a labelled domain: the distinct completions that the stage learns from.

    Raises:
        UserError: Its completions are free text, over which no sum is possible.
    """
    examples = learned_examples(module.dataset, stage.domain)
    labels = completions(examples)
    if len(labels) > min(MOST_LABELS, len(examples) // 2):
        raise UserError(
            f"{asked_by} on the domain {stage.domain!r}, whose {len(examples)} rows have {len(labels)} completions",
            why=f"it sums over every label, and only completions that repeat are labels (at most {MOST_LABELS})",
            fix="set fisher to sampled, which draws one label per row instead, or to empirical",
        )
    return labels


def pack_facts(facts: dict[str, Any]) -> Tensor:
    """JSON values as UTF-8 bytes, to lie beside tensors in a state."""
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def unpack_facts(packed: Tensor) -> dict[str, Any]:
    """The inverse of `pack_facts`."""
    return dict(json.loads(bytes(packed.tolist())))
