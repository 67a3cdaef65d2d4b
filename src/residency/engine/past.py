"""A model as it was: earlier weights in their places, without a second model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from residency.adapters.base import Adapter
from residency.core.tensors import swapped
from residency.core.types import Tensors
from residency.objectives.base import Was

__all__ = ["as_it_was", "writing"]


@contextmanager
def as_it_was(model: nn.Module, adapter: Adapter, when: Was | Tensors, *, start: Tensors) -> Iterator[None]:
    """Inside, the model is in evaluation mode, without gradients, with the weights of then.

    Args:
        model: Left as it was found.
        adapter: Which of its tensors move.
        when: `now`, before the stage's first step, or without the adapter; or what moves, as it was at another time.
        start: What moves, as it was before the stage's first step.
    """
    training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if when == "pretrained":
                stack.enter_context(adapter.reference(model))
            elif when != "now":
                leaves = adapter.trainable(model)
                values = start if when == "stage_start" else when
                stack.enter_context(
                    swapped(leaves, {name: values[name].to(leaf.device) for name, leaf in leaves.items()})
                )
            yield
    finally:
        model.train(training)


@contextmanager
def writing(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Inside, the model writes: as it is now, in evaluation mode, without gradients, in its fastest form."""
    with as_it_was(model, adapter, "now", start={}), adapter.folded_for_scoring(model):
        yield
