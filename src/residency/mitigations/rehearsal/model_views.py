"""What the model as it stands makes of stored examples: likelihoods and features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from residency.core.batching import by_token_budget, make_batch
from residency.core.errors import UserError
from residency.core.types import Batch, Example, Tensors
from residency.mitigations.contract import StageModule

__all__ = ["evaluating", "example_loss", "example_means", "mean_hidden", "passes", "swapped"]

PASS_TOKENS = 1024  # without gradients memory is no question


def example_means(values: Tensor, batch: Batch) -> Tensor:
    """Means over each example's supervised positions.

    Args:
        values: (M, ...) one value per supervised position.
        batch: B examples.

    Returns:
        (B, ...).
    """
    sums = values.new_zeros(batch.size, *values.shape[1:]).index_add(0, batch.target_example, values)
    counts = batch.target_example.bincount(minlength=batch.size).to(values.dtype)
    return sums / counts.view(-1, *[1] * (values.dim() - 1))


@contextmanager
def evaluating(module: StageModule) -> Iterator[None]:
    """Inside, dropout is off; afterwards the model is in the mode in which it was."""
    training = module.model.training
    module.model.eval()
    try:
        yield
    finally:
        module.model.train(training)


def passes(module: StageModule, examples: Sequence[Example]) -> Iterator[tuple[list[int], Batch]]:
    """Every example once, those of one length together: (their numbers, a batch on the module's device)."""
    order = iter(sorted(range(len(examples)), key=lambda i: (len(examples[i]), i)))
    for group in by_token_budget(sorted(examples, key=len), tokens=PASS_TOKENS):
        yield [next(order) for _ in group], make_batch(group, layout=module.layout).to(module.device)


@torch.no_grad()
def example_loss(module: StageModule, examples: Sequence[Example]) -> Tensor:
    """(n,) loss of each example per unit (for a likelihood: nats per token), in evaluation mode."""
    # Lightning makes float64 the default in 64-true.
    found = torch.zeros(len(examples), device=module.device, dtype=torch.float32)
    with evaluating(module):
        for rows, batch in passes(module, examples):
            units = [module.objective.units(example) for example in batch.examples]
            found[rows] = module.example_losses(batch).float() / torch.tensor(
                units, device=module.device, dtype=torch.float32
            )
    return found


@torch.no_grad()
def mean_hidden(module: StageModule, examples: Sequence[Example]) -> Tensor:
    """(n, D) mean last hidden state over the positions that predict a completion, on the CPU, in evaluation mode."""
    head = module.backbone.output_layer(module.model)
    if head is None:
        raise UserError(
            f"{type(module.model).__name__} has no output embeddings, and a memory was to be chosen by hidden states",
            why="herding and k-means compare what the model's head reads",
            fix="choose policy: balanced",
        )
    parts: dict[int, Tensor] = {}
    # What the head reads takes the place of what it writes: the backbone's own code then picks the positions.
    handle = head.register_forward_hook(lambda head, inputs, output: inputs[0])
    try:
        with evaluating(module):
            for rows, batch in passes(module, examples):
                means = example_means(module.backbone.outputs(module.model, batch).float(), batch).cpu()
                parts |= zip(rows, means, strict=True)
    finally:
        handle.remove()
    return torch.stack([parts[i] for i in range(len(examples))])


@contextmanager
def swapped(leaves: Tensors, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the leaves have other values; afterwards their own again, bit for bit. No graph may be pending."""
    own = {name: leaves[name].detach().clone() for name in values}
    try:
        with torch.no_grad():
            for name, value in values.items():
                leaves[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                leaves[name].copy_(value)
