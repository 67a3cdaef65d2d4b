"""The contract of an objective: what is minimised, per example, whatever the layout, the model and the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Batch, Capability, Example, Layout, Outputs, Stage, Tensors, supervised_tokens

__all__ = ["ExampleLosses", "Forward", "Learner", "Objective", "Passes", "Reads", "Was", "target_nll"]

Forward = Callable[[Batch], Tensor]
"""Batch -> (M, V) logits at its supervised positions."""

Reads = Literal["completion", "label", "pair", "unpaired", "prompt"]
"""What an objective needs of a row: what to write; one of a closed set of labels; a chosen and a rejected answer; one
answer, wanted or not; or a prompt, which the policy answers itself (and what its reward compares with).
"""

Was = Literal["now", "stage_start", "pretrained"]
"""The model as it is, as it was before the first step of the stage, or without its adapter."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """A `Forward` that can also do without logits.

    Args:
        logits: Batch -> (M, V).
        nll: Batch -> (M,) nats of its targets: faster, and without logits in memory.
    """

    logits: Forward
    nll: Forward

    def __call__(self, batch: Batch) -> Tensor:
        """(M, V) logits."""
        return self.logits(batch)


@dataclass(frozen=True, kw_only=True)
class ExampleLosses:
    """What an objective computed of the examples of one batch.

    Args:
        values: (B,) the loss of each example, summed over its units; their sum over a global batch divided by its units
            is the loss of the step.
        logits: (M, V) where they were computed anyway, or `None`.
        log: Named detached scalars.
    """

    values: Tensor
    logits: Tensor | None = None
    log: Mapping[str, Tensor] = field(default_factory=dict)


class Learner(Protocol):
    """What an objective may ask of the module that learns by it, before a stage and before a step."""

    model: nn.Module
    backbone: Any
    layout: Layout
    stage: Stage

    @property
    def device(self) -> torch.device: ...

    @property
    def global_step(self) -> int: ...

    def forward(self, batch: Batch) -> Tensor:
        """(M, V) logits at the supervised positions."""

    def as_it_was(self, when: Was | Tensors) -> AbstractContextManager[None]:
        """Inside, the model is in evaluation mode, without gradients, with the weights of then, or with those given."""

    @property
    def weights_after(self) -> Callable[[int], Tensors]:
        """What moves, as an earlier stage of the run (from 1) left it."""

    def writing(self) -> AbstractContextManager[None]:
        """Inside, the model writes: as it is now, in evaluation mode, without gradients, in its fastest form."""


class Objective(ABC):
    """A function of (forward, batch, reference), not a trainer: it never sees the optimizer or the loop.

    **One normaliser per step.** The loss of a step is a sum over its global batch divided by the `units` of that batch,
    however it is cut into micro-batches. The Trainer averages the losses of the micro-batches; so the loss of one of
    them is its own sum over `Batch.normaliser(units)`, the mean number of units per micro-batch, and never the mean
    over its own units, which would weigh a token by how many others happened to lie beside it.

    **Per example.** `losses` gives one number per example, so that what protects earlier stages (Fisher information,
    gradients to be kept apart, choices by loss) follows the objective, whatever it is.
    """

    reads: ClassVar[Reads] = "completion"

    requires: frozenset[Capability] = frozenset()
    """What the adapter must provide; may be set per instance."""

    forward_noise: ClassVar[bool] = True
    """Whether dropout is on while it trains. A ratio to a reference, and a reward, are those of the model itself."""

    decoder_only: str = ""
    """Why it does not work on an encoder-decoder; empty if it does. May be set per instance."""

    shardable: bool = False
    """Whether it passes the model equally often on every rank, as a base in parts needs it. Not inherited; may be set
    per instance."""

    learns_prompts: ClassVar[bool] = False
    """Whether tokens of prompts are learnt, too."""

    not_on_classifiers: str = ""
    """Why it does not work on a sequence classifier; empty if it does. May be set per instance."""

    keeps_start: bool = False
    """Whether it asks for the weights before the stage's first step once training runs: costs a copy of what trains."""

    uses_logits: bool = False
    """Whether it reads whole distributions, not only the likelihood of the targets; may be set per instance."""

    def collate(self, examples: Sequence[Example], *, layout: Layout) -> Batch:
        """Lay examples out for this objective: all their branches, what they share once."""
        return make_batch(examples, layout=layout)

    def units(self, example: Example) -> float:
        """How much an example counts in the normaliser of a step: its supervised tokens."""
        return supervised_tokens(example)

    @abstractmethod
    def losses(self, forward: Forward, batch: Batch, reference: Forward | None) -> ExampleLosses:
        """The loss of each example of a batch.

        Args:
            forward: The model being trained; a `Passes` where nobody else reads the logits.
            batch: As `collate` made it.
            reference: The pretrained behaviour without gradient, or `None` where the adapter cannot provide it.
        """

    def __call__(self, forward: Forward, batch: Batch, reference: Forward | None) -> Outputs:
        """The loss of one batch: the sum over its examples, divided by `batch.normaliser(self.units)`."""
        found = self.losses(forward, batch, reference)
        # A step without a unit (every answer was cut off and left out) has no loss.
        loss = found.values.sum() / (batch.normaliser(self.units) or 1.0)
        return Outputs(loss=loss, logits=found.logits, log=found.log)

    def per_example(self, forward: Forward, batch: Batch, reference: Forward | None) -> Tensor:
        """(B,) the loss of each example, summed over its units, as if it were alone."""
        return self.losses(forward, batch, reference).values

    # -- before a stage, before a step --------------------------------------------------------------------------

    def begin_stage(self, learner: Learner, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """What a stage learns from, once the mitigations and the adapter have begun it and before its first step.

        A function of the weights that the stage begins with: a stage that goes on after a kill is begun again from
        them, not from its checkpoint.

        Args:
            learner: The module.
            dataset: Position -> example.
            stage: Which one.
        """
        return dataset

    def prepare(self, learner: Learner, batch: Batch) -> Batch:
        """What a micro-batch learns from: where answers are written, or statistics of the whole step are taken.

        A function of (weights, seed, stage, step, global batch), not of how the step is cut.
        """
        return batch

    def judged(self, learner: Learner, examples: Sequence[Example]) -> list[Example]:
        """A finished stage's examples, as what protects it judges the model by them."""
        return list(examples)

    def state_dict(self) -> dict[str, Tensor]:
        """What a stage that is killed needs in order to go on, beyond what `begin_stage` and `prepare` make again."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""


def target_nll(forward: Forward, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """(M,) nats of the targets, and the (M, V) logits where only they are there to compute them from."""
    if isinstance(forward, Passes):
        return forward.nll(batch), None
    logits = forward(batch)
    return nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none"), logits


def refuse(objective: object, got: str, *, why: str, fix: str) -> UserError:
    """The error of an objective whose arguments make no sense."""
    return UserError(f"{type(objective).__name__} with {got}", why=why, fix=fix)
