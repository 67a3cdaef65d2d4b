"""The contract of an adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from residency.errors import UserError
from residency.types import Capability, Tensors

__all__ = ["Adapter", "OptimizerFactory", "missing_capability"]

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


class Adapter(ABC):
    """Decides which coordinates of a backbone move while a domain is learned, and how they step.

    An adapter has no tensors of its own: they live in the model that `attach` returns, under the names of
    `trainable`. So a state is a mapping of names to tensors, and every method is a function of (model, state).
    """

    provides: frozenset[Capability] = frozenset()
    """What mitigations may rely on; may be narrowed per instance."""

    uses_stream_length: bool = False
    """Whether it looks at `Stage.stages`; if not, streams of different lengths share their common prefix."""

    @abstractmethod
    def attach(self, model: nn.Module) -> nn.Module:
        """Prepare a pretrained model: add modules, freeze the rest. Idempotent. Draws from the global generator,
        which the caller has seeded.
        """

    def trainable(self, model: nn.Module) -> dict[str, Tensor]:
        """The live leaves that move, by parameter name; tied parameters once."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        """The optimizer of one stage, from the user's factory."""
        return factory(list(self.trainable(model).values()))

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Everything that must be stored so that `load_state` on a freshly attached model restores this one."""
        return {name: p.detach() for name, p in self.trainable(model).items()}

    @torch.no_grad()
    def load_state(self, model: nn.Module, state: Tensors) -> None:
        """Copy a stored state into the model, bit for bit.

        Raises:
            UserError: Names or shapes differ, so the state belongs to another adapter or backbone.
        """
        live = self.trainable(model)
        if wrong := sorted(
            {*live} ^ {*state} | {n for n in {*live} & {*state} if live[n].shape != state[n].shape},
        ):
            raise UserError(
                f"a stored state does not fit {type(self).__name__}: {len(wrong)} tensors differ, first {wrong[0]!r}",
                why="it was written with another adapter, rank, target or backbone",
                fix="use the config that lies beside the state (config.yaml), or another --run_dir",
            )
        for name, tensor in live.items():
            tensor.copy_(state[name])

    def weights(self, model: nn.Module, state: Tensors) -> Tensors:
        """A state in the space where averaging is meaningful (needs `averageable`).

        Args:
            model: The attached model (for shapes and scales; not changed).
            state: As `state` returns it.
        """
        raise missing_capability(self, "averageable")

    def load_weights(self, model: nn.Module, weights: Tensors) -> Mapping[str, float]:
        """The inverse of `weights`: bring the model as close to `weights` as the adapter can.

        Returns:
            Named numbers worth logging, for example the relative error of a projection.
        """
        raise missing_capability(self, "averageable")

    def reference(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Inside the context the model behaves as pretrained (needs `reference`)."""
        raise missing_capability(self, "reference")

    @abstractmethod
    def export(self, model: nn.Module, path: Path) -> None:
        """Write what plain `transformers` or `peft` loads."""


def missing_capability(adapter: Adapter, capability: Capability) -> UserError:
    """The error for a method that an adapter cannot support."""
    return UserError(
        f"{type(adapter).__name__} was asked for {capability!r}, "
        f"and it provides {sorted(adapter.provides) or 'nothing'}",
        why="there is no exact way to do it with this adapter",
        fix="use an adapter that provides it, for example configs/adapter/lora.yaml",
    )
