"""Stages without a Trainer: what the tests of adapters that grow over a stream share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from residency.adapters import Adapter
from residency.backbones import CausalLM
from residency.core.batching import make_batch
from residency.core.types import Batch, Layout, Stage
from support.tuned_models import EXAMPLES, learn

__all__ = ["go", "observing", "stage"]


def stage(index: int, *, stages: int = 3) -> Stage:
    """The stage at a position; its domain is `d<index>`."""
    return Stage(index=index, domain=f"d{index}", stages=stages, seed=0, steps=4, batch_size=4)


def observing(model: Any, layout: Layout = "padded") -> Any:
    """A pass over `EXAMPLES`, as `residency.engine.observation.observe` makes it."""

    def observe() -> Iterator[Batch]:
        model.eval()
        batch = make_batch(EXAMPLES, layout=layout)
        with torch.no_grad():
            CausalLM(path="unused").logits(model, batch)
        yield batch

    return observe


def go(model: Any, adapter: Adapter, stages: int, *, train: bool = True, **how: Any) -> Any:
    """Begin, train and end stages; `how` goes to `attached.learn`."""
    for index in range(stages):
        torch.manual_seed(index)
        adapter.begin_stage(model, stage(index), observing(model))
        if train:
            learn(model, **how)
        adapter.end_stage(model, stage(index), observing(model))
    return model
