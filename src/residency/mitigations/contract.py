"""What a mitigation may touch of the module that calls it.

`ContinualModule` (`engine/module.py`) satisfies the protocol; mitigations know the protocol only, so that they import
nothing of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from residency.adapters.base import Adapter
from residency.backbones.base import Backbone
from residency.core.types import Batch, Example, Layout, Stage, Tensors
from residency.objectives.base import Forward, Objective, Was

__all__ = ["StageModule"]


class StageModule(Protocol):
    """The module of a stage as its hooks see it.

    Attributes:
        model: The backbone with the adapter attached.
        adapter: Which coordinates move; names the trainable tensors.
        backbone: Tokenizer, generation, forward pass.
        objective: What is minimised.
        stage: The stage that is trained.
        dataset: Its training set, as the mitigations before the caller left it.
        layout: Of batches: `packed` or `padded`.
        base_weights: Weights before the first stage, in `transform_weights` and with `uses_base` only.
        trained_weights: Weights as the last step left them, in `transform_weights` and `served_weights` only.
        ended_early: Set to end the stage after the current step.
    """

    model: nn.Module
    adapter: Adapter
    backbone: Backbone
    objective: Objective
    stage: Stage
    dataset: Sequence[Example]
    layout: Layout
    base_weights: Tensors
    trained_weights: Tensors
    ended_early: bool

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    @property
    def global_step(self) -> int:
        """Optimizer steps of the stage so far."""

    @property
    def trained_forward(self) -> Forward:
        """What the objective gets in a training step."""

    def frozen_inputs(self) -> Mapping[str, Sequence[Tensor]]:
        """Input directions that mitigations keep out of the updates of a matrix, by the path of its owner."""

    def validation(self) -> Sequence[Example]:
        """Validation rows of the stage's own domain."""

    def forward(self, batch: Batch) -> Tensor:
        """(M, V) logits at the supervised positions."""

    @property
    def weights_after(self) -> Callable[[int], Tensors]:
        """What moves, as an earlier stage of the run (from 1) left it."""

    def as_it_was(self, when: Was | Tensors) -> AbstractContextManager[None]:
        """Inside, the model is in evaluation mode, without gradients, with the weights of then, or with those given."""

    def writing(self) -> AbstractContextManager[None]:
        """Inside, the model writes: as it is now, in evaluation mode, without gradients, in its fastest form."""

    def example_losses(self, batch: Batch) -> Tensor:
        """(B,) what the objective makes of each example of a batch, summed over its units."""

    def reference_forward(self, batch: Batch) -> Tensor:
        """(M, V) logits of the pretrained model, without gradient."""

    @property
    def optimizers(self) -> Callable[..., Any]:
        """Gives the optimizer of the stage, as Lightning wraps it or (`use_pl_optimizer=False`) bare."""
