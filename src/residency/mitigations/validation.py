"""How well a model does on the validation rows of the domain it is learning; of no other domain."""

from __future__ import annotations

import torch

from residency.core.batching import by_token_budget, make_batch
from residency.core.losses import token_nll
from residency.core.tensors import wide
from residency.mitigations.contract import StageModule

__all__ = ["validation_nll"]

VALIDATION_TOKENS = 2048  # per pass; without gradients memory is no question


@torch.no_grad()
def validation_nll(module: StageModule) -> float:
    """Mean nats per completion token over the validation rows of the running stage's own domain.

    The model is in evaluation mode while it runs and as before afterwards; no random number is drawn from outside.
    """
    training = module.model.training
    module.model.eval()
    total, count = 0.0, 0
    try:
        with torch.random.fork_rng(devices=[]):
            for group in by_token_budget(sorted(module.validation(), key=len), tokens=VALIDATION_TOKENS):
                batch = make_batch(group, layout=module.layout).to(module.device)
                total += float(wide(token_nll(module.forward(batch), batch.targets)).sum())
                count += len(batch.targets)
    finally:
        module.model.train(training)
    return total / count
