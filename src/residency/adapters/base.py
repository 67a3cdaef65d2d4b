"""The contract of an adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from residency.core.errors import UserError
from residency.core.parts import put_into, whole
from residency.core.types import Batch, Capability, Example, Stage, Tensors
from residency.scorers.base import ScoreInfo

__all__ = [
    "Adapter",
    "LowRankLayer",
    "Observe",
    "OptimizerFactory",
    "PromptNLL",
    "Served",
    "changes",
    "copy_state",
    "missing_capability",
]

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]

Observe = Callable[[], Iterator[Batch]]
"""Yields every example of a stage once in batches, each after the model has run on it (no gradient, evaluation mode):
forward hooks of the adapter have seen its activations by then."""

PromptNLL = Callable[[Sequence[Example]], Tensor]
"""Examples -> (B,) nats per prompt token under the model as it stands. Completions are not looked at."""

Served = tuple[AbstractContextManager[Any], Sequence[Example]]
"""Rows, and the context in which the model answers them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankLayer:
    """A linear layer y = W x + s B A x whose factors move.

    Args:
        path: Of the module that maps x to y.
        a: Parameter name of A (r, in).
        b: Parameter name of B (out, r).
        scale: s.
    """

    path: str
    a: str
    b: str
    scale: float


class Adapter(ABC):
    """Decides which coordinates of a backbone move while a domain is learned, and how they step.

    An adapter has no tensors of its own: they live in the model that `attach` returns, under the names of
    `trainable`. So a state is a mapping of names to tensors, and every method is a function of (model, state).

    The order of calls: `attach` once; then per stage `begin_stage`, `optimizer`, per step `loss_terms` and
    `transform_update`, and `end_stage`; `route` whenever a state is scored.
    """

    provides: frozenset[Capability] = frozenset()
    """What mitigations and commands may rely on; may be narrowed per instance."""

    task_id_at_test: bool = False
    """Whether scoring a domain uses its name: such scores are no answer to "which domain is this?"."""

    steps_in_backward: bool = False
    """Whether parameters step inside the backward pass and no gradient outlives it: then nothing can be accumulated or
    clipped, and mitigations that read gradients or updates are refused."""

    continues: bool = True
    """Whether the function after `begin_stage` is the one that the stage before left; not where a stage starts with
    factors drawn anew or in front of a new prompt."""

    decoder_only: str = ""
    """Why it does not work on an encoder-decoder; empty if it does. May be set per instance."""

    not_on_classifiers: str = ""
    """Why it does not work on a sequence classifier; empty if it does. May be set per instance."""

    shardable: bool = False
    """Whether all that trains lies beside frozen weights that only their own forward reads: each of several processes
    can then keep a part of them. May be set per instance."""

    trains_in_parts: bool = False
    """Whether what trains are whole weights that only their own forward reads: of these a process can keep a part,
    too. Not inherited."""

    uses_stream_length: bool = False
    """Whether it looks at `Stage.stages`; if not, streams of different lengths share their common prefix."""

    scorers: Mapping[str, ScoreInfo] = MappingProxyType({})
    """What `extra_scores` may give, by name: orientation, unit, and whether means are over tokens."""

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

    def step_bytes(self, model: nn.Module) -> int:
        """Bytes that its optimizer works with while it steps, beyond its state and the gradients."""
        return 0

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Everything that must be stored so that `load_state` on a freshly attached model restores this one; whole."""
        return {name: whole(p.detach()) for name, p in self.trainable(model).items()}

    @torch.no_grad()
    def load_state(self, model: nn.Module, state: Tensors) -> None:
        """Copy a stored state into the model, bit for bit.

        Raises:
            UserError: Names or shapes differ, so the state belongs to another adapter or backbone.
        """
        copy_state(self.trainable(model), state, owner=type(self).__name__)

    # -- over a stream ------------------------------------------------------------------------------------------

    def begin_stage(self, model: nn.Module, stage: Stage, observe: Observe) -> None:
        """Before a stage and before its optimizer is made: open a block, freeze the old one, draw factors anew.

        A deterministic function of (model, stage); the global generator is seeded for the stage. A resumed stage is
        begun again and then loads its checkpoint's state.
        """

    def end_stage(self, model: nn.Module, stage: Stage, observe: Observe) -> None:
        """After the last step, before any mitigation mixes weights: merge, remember."""

    def loss_terms(self, model: nn.Module, stage: Stage) -> Mapping[str, Tensor]:
        """Named scalars, already weighted, that belong to the method; logged as `loss/adapter/<term>`."""
        return {}

    def metrics_to_log(self, model: nn.Module, stage: Stage) -> Mapping[str, float]:
        """What is worth watching, read at logged steps only; logged as `adapter/<name>`."""
        return {}

    def transform_update(self, model: nn.Module, before: Tensors, after: Tensors) -> Tensors:
        """Replace the parameters after an optimizer step, before the mitigations do; never writes into `after`."""
        return after

    def route(
        self, model: nn.Module, column: str, examples: Sequence[Example], prompt_nll: PromptNLL
    ) -> Iterable[Served]:
        """Which part of the adapter answers which rows when a column is scored; one group by default.

        Args:
            model: The attached model.
            column: Domain or probe. An adapter that looks at it declares `task_id_at_test`.
            examples: Its rows.
            prompt_nll: For routing by what a prompt looks like.
        """
        return [(nullcontext(), examples)]

    def folded_for_scoring(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Inside the context many tokens are scored and nothing is trained: the same function in a faster form.

        Leaves the model bit for bit as it was. Entered inside the context of `route`; by default nothing is changed.
        """
        return nullcontext()

    def extra_scores(
        self,
        model: nn.Module,
        column: str,
        examples: Sequence[Example],
        completion_nll: PromptNLL,
        prompt_nll: PromptNLL,
    ) -> Mapping[str, Tensor]:
        """What else is worth scoring on a column, apart from how `route` answers it: {one of `scorers`: (B,) values}.

        Args:
            model: The attached model.
            column: Domain or probe.
            examples: Its rows.
            completion_nll: Examples -> (B,) nats per completion token under the model as it stands.
            prompt_nll: The same of the prompts.
        """
        return {}

    # -- spaces and files ---------------------------------------------------------------------------------------

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

    def low_rank(self, model: nn.Module, state: Tensors) -> Mapping[str, tuple[Tensor, Tensor]]:
        """The updates of a state that are products, by a name per weight: L (out, r) and R (r, in) with ΔW = L R.

        For measuring only. Empty where updates are no products; then `state` itself is compared between stages.
        """
        return {}

    def low_rank_layers(self, model: nn.Module) -> list[LowRankLayer]:
        """The layers whose factors are all that moves (needs `low_rank`)."""
        raise missing_capability(self, "low_rank")

    def adapted_weight(self, model: nn.Module, name: str) -> Tensor:
        """The frozen weight under an update of `low_rank`, dequantised, in the update's own shape (out, in)."""
        raise KeyError(name)

    def reference(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Inside the context the model behaves as pretrained (needs `reference`)."""
        raise missing_capability(self, "reference")

    def merge(self, model: nn.Module) -> nn.Module:
        """A plain transformers model that computes the same function (needs `mergeable`); may consume `model`."""
        raise missing_capability(self, "mergeable")

    @abstractmethod
    def export(self, model: nn.Module, path: Path) -> None:
        """Write what plain `transformers` or `peft` loads (with `exportable`)."""


def copy_state(live: Tensors, state: Tensors, *, owner: str) -> None:
    """Copy stored tensors into live ones of the same names and shapes, bit for bit.

    Raises:
        UserError: Names or shapes differ, so the state belongs to another adapter or backbone.
    """
    wrong = sorted({*live} ^ {*state} | {n for n in {*live} & {*state} if live[n].shape != state[n].shape})
    if wrong:
        raise UserError(
            f"a stored state does not fit {owner}: {len(wrong)} tensors differ, first {wrong[0]!r}",
            why="it was written with another adapter, rank, target or backbone",
            fix="use the config that lies beside the state (config.yaml), or another --run_dir",
        )
    with torch.no_grad():
        for name, tensor in live.items():
            put_into(tensor, state[name])


def changes(adapter: Adapter, method: str) -> bool:
    """Whether an adapter overrides a method; asked once, so that what it does not use costs nothing."""
    return getattr(type(adapter), method) is not getattr(Adapter, method)


def missing_capability(adapter: Adapter, capability: Capability) -> UserError:
    """The error for a method that an adapter cannot support."""
    return UserError(
        f"{type(adapter).__name__} was asked for {capability!r}, "
        f"and it provides {sorted(adapter.provides) or 'nothing'}",
        why="there is no exact way to do it with this adapter",
        fix="use an adapter that provides it, for example configs/adapter/lora.yaml",
    )
