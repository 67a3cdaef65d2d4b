"""Gradients of single examples from one pass over a batch.

For a linear layer y = x Wᵀ the gradient of example b is G_b = Σ_t dy_{b,t} x_{b,t}ᵀ (Goodfellow 2015): one forward,
one backward and one batched product per layer give all of them. Where a leaf is used in any other way (norms,
embeddings, tied heads, DoRA's magnitudes), every example gets a backward pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from residency.core.batching import make_batch
from residency.core.types import Batch, Tensors, segment_tokens

__all__ = ["ExampleLosses", "per_example_gradients", "supports_batched"]

ExampleLosses = Callable[[Batch], Tensor]
"""Batch -> (B,) one scalar per example, differentiable, no interaction between examples."""

# Relative difference between the sum of all per-example gradients and the batch's own gradient.
_TOLERANCE = 1e-3
_TRIED = 4  # examples


def per_example_gradients(
    model: nn.Module, leaves: Tensors, batch: Batch, losses: ExampleLosses, *, batched: bool
) -> Iterator[tuple[str, Tensor]]:
    """Gradients of every example of a batch, a few at a time.

    Args:
        model: The module that owns the leaves.
        leaves: Parameter name -> live leaf.
        batch: B examples, packed or padded.
        losses: The (B,) losses.
        batched: Use one pass for all examples (ask `supports_batched` first); otherwise one per example.

    Yields:
        (name, (b, *shape)): a name may come several times; the b of its parts sum to B.
    """
    if batched and _one_row_each(batch):
        try:
            yield from _batched(model, leaves, batch, losses)
            return
        except _NotPerExampleError:
            pass  # it says so before it gives any: a layer saw this batch otherwise than the one that was tried
    for example in batch.examples:
        single = make_batch([example], layout=batch.layout).to(batch.input_ids.device)
        gradients = torch.autograd.grad(losses(single).sum(), list(leaves.values()), allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            yield name, (torch.zeros_like(leaf) if gradient is None else gradient).unsqueeze(0)


def supports_batched(model: nn.Module, leaves: Tensors, batch: Batch, losses: ExampleLosses) -> bool:
    """Whether one pass gives the gradients of all leaves; found out by doing it and comparing the sums.

    A structural check alone would be wrong for layers whose weight is also used outside of their forward. A few
    examples of the batch tell as much as all of it.
    """
    batch = make_batch(batch.examples[:_TRIED], layout=batch.layout).to(batch.input_ids.device)
    if not _one_row_each(batch) or not all(isinstance(_owner(model, name), nn.Linear) for name in leaves):
        return False
    try:
        sums = {name: gradient.sum(0) for name, gradient in _batched(model, leaves, batch, losses)}
    except _NotPerExampleError:
        return False
    if {*sums} != {*leaves}:
        return False
    wanted = torch.autograd.grad(losses(batch).sum(), list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, wanted, strict=True):
        expected = torch.zeros_like(leaves[name]) if gradient is None else gradient
        if (sums[name] - expected).norm() > _TOLERANCE * expected.norm() + 1e-12:
            return False
    return True


def _one_row_each(batch: Batch) -> bool:
    """Padded, every branch of an example is a row; packed, they are one segment."""
    return len(batch.segments) == batch.size


class _NotPerExampleError(RuntimeError):
    """What a layer saw cannot be cut into examples: it ran twice, or not on the tokens of the batch."""


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _batched(model: nn.Module, leaves: Tensors, batch: Batch, losses: ExampleLosses) -> Iterator[tuple[str, Tensor]]:
    owners = {name.rpartition(".")[0]: _owner(model, name) for name in leaves}
    with _captured(owners) as calls:
        total = losses(batch).sum()
    outputs = [output for _, output in calls.values()]
    gradients = dict(zip(calls, torch.autograd.grad(total, outputs, allow_unused=True), strict=True))
    sizes = [segment_tokens(segment) for segment in batch.segments]
    for path, found in gradients.items():
        for tensor in (found, calls[path][0]) if found is not None else ():
            _check(tensor, batch)
    for name, leaf in leaves.items():
        path, _, kind = name.rpartition(".")
        gradient = gradients.get(path)
        if gradient is None:
            yield name, leaf.new_zeros(batch.size, *leaf.shape)
            continue
        dy = _per_example(gradient, batch, sizes)
        if kind == "bias":
            yield name, dy.sum(1)
        else:
            x = _per_example(calls[path][0], batch, sizes)
            yield name, dy.transpose(1, 2) @ x.to(dy.dtype)


def _check(tensor: Tensor, batch: Batch) -> None:
    """A row per token: not so in a head that runs at the supervised positions only, or an expert of some tokens."""
    rows, columns = batch.input_ids.shape
    packed = batch.layout == "packed"
    if tensor.dim() != 3 or tensor.shape[0] != rows or (packed and tensor.shape[1] != columns):
        raise _NotPerExampleError(f"{tuple(tensor.shape)} on a batch of {rows} x {columns} tokens")


def _per_example(tensor: Tensor, batch: Batch, sizes: list[int]) -> Tensor:
    """(1, N, D) or (B, T, D) -> (B, T, D), zeros where there is no token."""
    if batch.layout != "packed":
        return tensor
    return pad_sequence(list(tensor[0].split(sizes)), batch_first=True)


@contextmanager
def _captured(modules: dict[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of each module's one call."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_for(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if path in calls:
                raise _NotPerExampleError(path)
            calls[path] = (inputs[0].detach(), output)

        return hook

    handles = [module.register_forward_hook(hook_for(path)) for path, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
