"""Looking at a stage without changing it: which steps are logged, and one pass over what it learns from."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from residency.core.batching import by_token_budget, make_batch
from residency.core.types import Batch
from residency.mitigations.contract import StageModule

__all__ = ["logs_step", "observe"]

OBSERVED_TOKENS = 2048  # per pass; without gradients memory is no question


def logs_step(step: int, *, every: int, last: int) -> bool:
    """Whether a line of the history is due after an optimizer step (from 1)."""
    return step % every == 0 or step == last


def observe(module: StageModule) -> Iterator[Batch]:
    """Every example of the running stage once, in batches, each after the model has run on it in evaluation mode."""
    examples = {(e.domain, e.row): e for e in module.dataset}
    training = module.model.training
    module.model.eval()
    try:
        for group in by_token_budget(sorted(examples.values(), key=len), tokens=OBSERVED_TOKENS):
            batch = make_batch(group, layout=module.layout).to(module.device)
            with torch.no_grad():
                module.forward(batch)
            yield batch
    finally:
        module.model.train(training)
