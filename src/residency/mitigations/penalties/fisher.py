"""Which sensitivity of a model is estimated, and how: pure functions. Gradients are of single examples, always.

    empirical   E_(x,y)~data (∂ log p(y|x))²                 the data's own labels
    true        E_x Σ_c p_c (∂ log p_c)²                     every label, weighted as the model weights it
    sampled     E_x (∂ log p(ŷ|x))²,  ŷ ~ p                  one draw per position, given the data before it
    batch       mean over batches of (∂ mean loss)²          what much published code computes: about F / B where the
                                                             noise dominates (B = batch size); only to reproduce it

log p(y|x) is the SUM over the completion's tokens; with the mean over n tokens every F would be smaller by n².
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from residency.core.losses import token_nll
from residency.core.randomness import generator
from residency.core.ranks import own_share, sum_over_ranks
from residency.core.types import Batch, Example, Tensors
from residency.mitigations.penalties.per_example import ExampleLosses, per_example_gradients, supports_batched

__all__ = [
    "batch_fisher_diagonal",
    "completions",
    "data_losses",
    "draw_tokens",
    "fisher_diagonal",
    "mean_over_examples",
    "one_per_token",
    "sampled_losses",
    "true_fisher_diagonal",
]

Logits = Callable[[Batch], Tensor]
"""Batch -> (M, V)."""


def mean_over_examples(
    model: nn.Module,
    leaves: Tensors,
    batches: Iterable[Batch],
    losses: ExampleLosses,
    function: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Mean over examples of a function of one example's gradient.

    Args:
        model: Owner of the leaves, in evaluation mode (no dropout).
        leaves: θ by name.
        batches: Any grouping of the examples; the result does not depend on it.
        losses: Batch -> (B,) one scalar per example.
        function: Elementwise, for example `torch.square`.

    Returns:
        By name, float32.
    """
    total = {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in leaves.items()}
    count = 0
    batched: bool | None = None
    for batch in own_share(batches):
        if batched is None:
            batched = supports_batched(model, leaves, batch, losses)
        for name, gradients in per_example_gradients(model, leaves, batch, losses, batched=batched):
            total[name] += function(gradients.detach().float()).sum(0)
        count += batch.size
    return _mean(total, count)


def _mean(total: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Sums of this rank's share of some examples -> means over all of them."""
    counted = int(sum_over_ranks(torch.tensor(count)))
    if counted == 0:
        raise ValueError("a Fisher information needs at least one example, got none")
    return {name: sum_over_ranks(value) / counted for name, value in total.items()}


def fisher_diagonal(
    model: nn.Module, leaves: Tensors, batches: Iterable[Batch], losses: ExampleLosses
) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient of one example's loss; F >= 0 by name, float32."""
    return mean_over_examples(model, leaves, batches, losses, torch.square)


def batch_fisher_diagonal(leaves: Tensors, batches: Iterable[Batch], losses: ExampleLosses) -> dict[str, Tensor]:
    """Mean over batches of the square of the batch's mean gradient. Depends on the batches: a trap, kept to reproduce
    published code (Avalanche, PyCIL, TRACE and others).
    """
    total = {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in leaves.items()}
    count = 0
    for batch in own_share(batches):
        gradients = torch.autograd.grad(losses(batch).mean(), list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            total[name] += 0 if gradient is None else gradient.detach().float().square()
        count += 1
    return _mean(total, count)


def true_fisher_diagonal(
    model: nn.Module,
    leaves: Tensors,
    examples: Iterable[Example],
    labels: Sequence[tuple[int, ...]],
    losses: ExampleLosses,
    batch: Callable[[Sequence[Example]], Batch],
) -> dict[str, Tensor]:
    """Mean over prompts of Σ_c p_c (∂ log p_c)², with p = softmax over labels of their log-likelihoods ℓ.

    ∂ log p_c = ∂ℓ_c - Σ_k p_k ∂ℓ_k, so the sum is the variance under p of the gradients ∂ℓ: the data's label plays no
    part.

    Args:
        model: Owner of the leaves, in evaluation mode.
        leaves: θ by name.
        examples: Their prompts count.
        labels: The C completions that compete, at least one.
        losses: Batch -> (C,) -ℓ.
        batch: Lays examples out.

    Returns:
        F >= 0 by name, float32.
    """
    total = {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in leaves.items()}
    count = 0
    batched: bool | None = None
    for example in own_share(examples):
        rivals = batch([example.answered(label) for label in labels])
        if batched is None:
            batched = supports_batched(model, leaves, rivals, losses)
        with torch.no_grad():
            p = (-losses(rivals)).float().softmax(0)
        parts: dict[str, list[Tensor]] = {name: [] for name in leaves}
        for name, gradients in per_example_gradients(model, leaves, rivals, losses, batched=batched):
            parts[name].append(gradients.detach().float())
        for name, found in parts.items():
            gradient = torch.cat(found)
            centred = gradient - torch.tensordot(p, gradient, 1)
            total[name] += torch.tensordot(p, centred.square_(), 1)
        count += 1
    return _mean(total, count)


def data_losses(logits: Logits) -> ExampleLosses:
    """Batch -> (B,) negative log-likelihood of every completion, summed over its tokens."""
    return lambda batch: _per_example(token_nll(logits(batch), batch.targets), batch)


def sampled_losses(logits: Logits, *, seed: int, stage: int) -> ExampleLosses:
    """The same of completions that the model draws itself, token by token, each given the DATA before it.

    The draw is a function of seed, stage, row and token, not of the batch: it can be repeated, and any grouping of the
    examples gives the same labels.
    """

    def losses(batch: Batch) -> Tensor:
        found = logits(batch)
        uniform = [_uniform(e, seed=seed, stage=stage) for e in batch.examples]
        return _per_example(token_nll(found, draw_tokens(found.detach(), torch.cat(uniform).to(found.device))), batch)

    return losses


def _uniform(example: Example, *, seed: int, stage: int) -> Tensor:
    # A row that stands for one token of a longer completion draws as that token.
    words = ("fisher-label", stage, example.domain, example.row, len(example.prompt))
    return torch.rand(example.targets, generator=generator(seed, *words))


def draw_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """(M,) tokens from (M, V) logits by the inverse of the distribution function at (M,) numbers in [0, 1)."""
    distribution = logits.float().softmax(-1).cumsum(-1)
    at = uniform.to(distribution.dtype).unsqueeze(-1) * distribution[:, -1:]
    # `right`: the first token whose cumulated probability EXCEEDS the number, so that p = 0 is never drawn.
    return torch.searchsorted(distribution, at, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def _per_example(values: Tensor, batch: Batch) -> Tensor:
    return values.new_zeros(batch.size).index_add(0, batch.target_example, values)


def one_per_token(examples: Iterable[Example]) -> Iterator[Example]:
    """Every supervised token as an example of its own, with all tokens before it as the prompt."""
    for example in examples:
        for k in example.branches[0].supervised:
            prompt = (*example.prompt, *example.completion[:k])
            yield replace(example, prompt=prompt).answered((example.completion[k],))


def completions(examples: Iterable[Example]) -> list[tuple[int, ...]]:
    """The distinct completions and alternatives, in order of first appearance: the labels of a labelled domain."""
    return list(dict.fromkeys(c for e in examples for c in (e.completion, *e.alternatives)))
