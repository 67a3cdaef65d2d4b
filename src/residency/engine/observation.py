"""Looking at a stage without changing it: which steps are logged, and one pass over what it learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from residency.adapters.base import Observe
from residency.core.batching import by_token_budget, make_batch
from residency.core.randomness import seed_devices
from residency.core.types import Batch, Stage
from residency.mitigations.contract import StageModule

__all__ = ["adapter_stage", "logs_step", "observe"]

OBSERVED_TOKENS = 2048  # per pass; without gradients memory is no question


def logs_step(step: int, *, every: int, last: int) -> bool:
    """Whether a line of the history is due after an optimizer step (from 1)."""
    return step % every == 0 or step == last


def observe(module: StageModule) -> Iterator[Batch]:
    """Every example of the running stage once, in batches, each after the model has run on it in evaluation mode."""
    learned = list({(e.domain, e.row): e for e in module.dataset}.values())
    examples = module.objective.judged(module, learned)
    training = module.model.training
    module.model.eval()
    try:
        for group in by_token_budget(sorted(examples, key=len), tokens=OBSERVED_TOKENS):
            batch = make_batch(group, layout=module.layout).to(module.device)
            with torch.no_grad():
                module.forward(batch)
            yield batch
    finally:
        module.model.train(training)


def adapter_stage(module: StageModule, call: Callable[[nn.Module, Stage, Observe], None], moment: str) -> None:
    """One of the adapter's stage hooks, with random numbers of its own."""
    with torch.random.fork_rng(devices=[]):
        seed_devices(module.stage.seed, "adapter", moment, module.stage.index)
        call(module.model, module.stage, partial(observe, module))
