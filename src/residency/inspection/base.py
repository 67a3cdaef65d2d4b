"""The contract of an observer: it looks inside the model, and never changes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from residency.core.batching import by_token_budget, make_batch
from residency.core.randomness import seed_devices
from residency.core.types import Batch, Example, Split, Stage, Tensors
from residency.engine.scoring.likelihoods import prompt_nll

if TYPE_CHECKING:
    from residency.domains.stream_data import StreamData
    from residency.engine.module import ContinualModule

__all__ = ["Observer", "StageSnapshot", "watches_training"]


@dataclass(frozen=True, kw_only=True)
class StageSnapshot:
    """One state of the model, and what it may be compared with.

    Args:
        module: In the state after stage k, in evaluation mode.
        data: Domains and probes.
        k: 0 = before training.
        seed: The run's seed.
        states: Gives the adapter's state after an earlier stage (1 ... k), as it was stored.
    """

    module: ContinualModule
    data: StreamData
    k: int
    seed: int
    states: Callable[[int], Tensors]

    def pristine(self) -> nn.Module:
        """A second model, loaded anew, with the adapter attached as at the start of the run."""
        backbone = self.module.backbone.load()
        with torch.random.fork_rng(devices=[]):
            seed_devices(self.seed, "adapter")
            return copy.deepcopy(self.module.adapter).attach(backbone).to(self.module.device).eval()

    @contextmanager
    def pretrained(self) -> Iterator[nn.Module]:
        """What behaves as before training: this model with its adapter off where that is exact, else `pristine`."""
        if "reference" in self.module.adapter.provides:
            with self.module.adapter.reference(self.module.model):
                yield self.module.model
        else:
            yield self.pristine()

    @contextmanager
    def before_stage(self) -> Iterator[nn.Module]:
        """What the stage began with: this model as it was after the stage before; of the first stage `pretrained`."""
        if self.k <= 1:
            with self.pretrained() as model:
                yield model
            return
        adapter, model = self.module.adapter, self.module.model
        now = {name: tensor.detach().clone() for name, tensor in adapter.state(model).items()}
        with torch.random.fork_rng(devices=[]):  # some adapters make parts anew, and draw their first values
            adapter.load_state(model, self.states(self.k - 1))
            try:
                yield model
            finally:
                adapter.load_state(model, now)

    def batches(self, *, tokens: int) -> Iterator[tuple[str, Batch]]:
        """(column, batch) of fixed rows of every domain and probe, the same at every call.

        Args:
            tokens: Over all columns, split evenly; every column has at least one row.
        """
        share = max(1, tokens // len(self.data.columns))
        for name, domain in self.data.columns.items():
            split: Split = "validation" if domain.rows("validation") else "test"
            rows = self.data.evaluation_examples(name, split, self.module.backbone.tokenizer, competing=0)
            chosen: list[Example] = []
            used = 0
            for example in rows:
                if chosen and used >= share:
                    break
                chosen.append(example)
                used += len(example) - 1  # its last token is a target only
            for group in by_token_budget(chosen, tokens=512):
                yield name, make_batch(group, layout=self.module.layout).to(self.module.device)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(M, V) at the supervised positions, of a model as it stands."""
        return self.module.backbone.logits(model, batch)

    def served(self, column: str, batch: Batch, read: Callable[[Batch], Tensor]) -> Tensor:
        """What is read of every example while the part of the adapter answers that scoring would choose for it.

        Args:
            column: Domain or probe of the batch.
            batch: Some of its rows.
            read: A batch -> a tensor whose first dimension follows the examples.

        Returns:
            As `read` of the whole batch.
        """
        module, device = self.module, self.module.device
        groups = module.adapter.route(module.model, column, batch.examples, partial(prompt_nll, module))
        found: dict[str, Tensor] = {}
        for context, examples in groups:
            with context:
                if len(examples) == batch.size:
                    return read(batch)
                for e in examples:
                    found[e.row] = read(make_batch([e], layout=batch.layout).to(device))
        return torch.cat([found[e.row] for e in batch.examples])


class Observer:
    """The null observer; every method may be overridden. What it finds is JSON, and goes into the stage's record."""

    decoder_only: str = ""
    """Why it does not work on an encoder-decoder; empty if it does."""

    not_on_classifiers: str = ""
    """Why it does not work on a sequence classifier; empty if it does. May be set per instance."""

    def callbacks(self, stage: Stage, data: StreamData) -> list[Callback]:
        """New callbacks for the Trainer of one stage; they only watch."""
        return []

    def during(self) -> Mapping[str, Any]:
        """What the callbacks have found, asked for once when the stage is trained."""
        return {}

    def after(self, snapshot: StageSnapshot) -> Mapping[str, Any]:
        """What there is to see in the state after a stage, or before training. Gradients are off."""
        return {}


def watches_training(observer: Observer) -> bool:
    """Whether it sees the steps of a stage, and not only the state after it."""
    return type(observer).callbacks is not Observer.callbacks
