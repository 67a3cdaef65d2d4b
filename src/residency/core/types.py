"""The nouns of the contract: rows, examples, batches, outputs, capabilities.

Shape suffixes used in names and docstrings:

    B  examples in a batch            T  tokens of the longest example
    N  tokens of a packed row         M  supervised positions of a batch
    V  vocabulary                     D  hidden size
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, Union

import torch
from torch import Tensor

from residency.core.examples import Branch, Example, Role, Row, RowKind, Split

__all__ = [
    "NOTHING",
    "Batch",
    "Branch",
    "Capability",
    "Example",
    "ExampleView",
    "GlobalBatch",
    "Kind",
    "Layout",
    "Outputs",
    "Role",
    "Row",
    "RowKind",
    "Segment",
    "Split",
    "Stage",
    "Tensors",
    "segment_tokens",
    "supervised_tokens",
    "untyped",
]

Tensors = Mapping[str, Tensor]
"""Parameter name -> tensor. May compute its values on access: iterate, do not copy."""

NOTHING: Mapping[str, Any] = MappingProxyType({})
"""No names; not to be changed."""

Capability = Literal["fixed_coordinates", "averageable", "linear", "low_rank", "reference", "mergeable", "exportable"]
"""What an adapter can promise to a mitigation or to the user.

`fixed_coordinates`: the same trainable coordinates persist over all domains (EWC, SI, MAS need it).
`averageable`: there is a space in which averaging two states is meaningful (`Adapter.weights`).
`linear`: what moves are weights of linear layers (with norms, biases and embeddings), or factors A and B of an update
    that is added to them; to fix input or output features of these is to fix the layer's (GPM, MIGU, SSU need it).
`low_rank`: all that moves are the factors of updates s B A that are added to weights of linear layers (plain LoRA), so
    that a distance between two states can be measured in the space of the weights (`Adapter.low_rank_layers`).
`reference`: the pretrained behaviour is available without a second model (`Adapter.reference`).
`mergeable`: the adapter folds into the backbone's own weights without changing the function (`Adapter.merge`).
`exportable`: plain `transformers` or `peft` load what `Adapter.export` writes.
"""

Layout = Literal["packed", "padded"]
Kind = Literal["label", "generative"]
"""Of a domain. `label`: completions are few and closed (classification). `generative`: completions are free text."""

Segment = tuple[Union[int, "Segment"], ...]
"""Tokens that depend on each other: `(n,)` is n tokens one after another; `(n, branch, branch, ...)` is n tokens that
every branch goes on from without seeing the others. A branch is a number of tokens or a segment itself. In a row the
first n tokens come first, then the branches, each whole."""


def segment_tokens(segment: Segment) -> int:
    """How many tokens a segment has, all branches together."""
    return sum(part if isinstance(part, int) else segment_tokens(part) for part in segment)


def supervised_tokens(example: Example) -> int:
    """Tokens that an example is trained on, over all its branches."""
    return sum(len(branch.supervised) for branch in example.branches)


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatch:
    """All that one optimizer step learns from, of which a micro-batch is a part.

    Args:
        examples: Of the step, slot by slot, over all micro-batches and devices.
        slots: Which of them the micro-batch holds, in its order.
        parts: Micro-batches of the step, over all devices. The Trainer averages their losses and gradients.
    """

    examples: tuple[Example, ...]
    slots: tuple[int, ...]
    parts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Examples side by side in one row (packed) or one example per row (padded).

    Everything that is per example is addressed through `segments`, `target_example` and `examples`;
    nobody but the model's forward needs to know the layout.

    Args:
        layout: `packed`: one row of N tokens, attention per segment. `padded`: B rows of T tokens.
        input_ids: (1, N) or (B, T), int64.
        position_ids: Same shape; restarts at 0 in every example, and in a branch goes on from where it left.
        attention_mask: (B, T), 1 = token, 0 = padding. `None` when packed.
        segments: Per example (packed) or per row (padded). An example's branches go on from its
            prompt, and branch in turn where they part: beginnings that they share are in the row once. The last
            token of each is a target only and not in the row.
        target_at: (M,) positions, in the row-major flattened `input_ids`, whose next token is supervised; one position
            may have several targets.
        targets: (M,) the supervised tokens.
        target_example: (M,) index of the example (0 ... B-1) each target belongs to.
        target_branch: (M,) which of the example's branches.
        examples: The B examples themselves, in order.
        part_of: The global batch of the step; `None` where the batch is a whole of its own (scoring, a memory).
    """

    layout: Layout
    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segments: tuple[Segment, ...]
    target_at: Tensor
    targets: Tensor
    target_example: Tensor
    target_branch: Tensor
    examples: tuple[Example, ...]
    part_of: GlobalBatch | None = None

    @property
    def size(self) -> int:
        """Number of examples B."""
        return len(self.examples)

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding."""
        return sum(segment_tokens(segment) for segment in self.segments)

    @property
    def whole(self) -> GlobalBatch:
        """The global batch; of a batch that is no part of one, itself."""
        if self.part_of is not None:
            return self.part_of
        return GlobalBatch(examples=self.examples, slots=tuple(range(self.size)), parts=1)

    def normaliser(self, units: Callable[[Example], float]) -> float:
        """What a sum over this batch is divided by, so that the mean over the micro-batches of a step is the sum over
        the global batch divided by its units: the units of the global batch per micro-batch.

        Args:
            units: How much one example counts, for example its supervised tokens.
        """
        return sum(units(example) for example in self.whole.examples) / self.whole.parts

    @property
    def target_weights(self) -> Tensor | None:
        """(M,) the weight of each target's branch; `None` if all are 1."""
        weights = [[branch.weight for branch in example.branches] for example in self.examples]
        if all(weight == 1 for row in weights for weight in row):
            return None
        pairs = zip(self.target_example.tolist(), self.target_branch.tolist(), strict=True)
        return torch.tensor([weights[e][b] for e, b in pairs], device=self.targets.device)

    def to(self, device: Any, **kwargs: Any) -> Batch:
        """A copy with every tensor on `device` (Lightning calls this); pinned memory is not waited for."""
        if torch.device(device).type == "cuda":
            kwargs.setdefault("non_blocking", True)
        return self._with(lambda tensor: tensor.to(device, **kwargs))

    def pin_memory(self) -> Batch:
        """A copy in memory from which a GPU reads by itself (torch's `DataLoader` calls this)."""
        return self._with(lambda tensor: tensor.pin_memory())

    def _with(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in tensors.items()}
        return replace(self, **changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What an objective computed on one batch.

    Args:
        loss: Scalar that is minimised (nats per supervised token for SFT); of a micro-batch, such that the mean over
            the micro-batches of a step is the loss of the global batch (`Batch.normaliser`).
        logits: (M, V) at the supervised positions, attached to the graph, or `None` if the objective has none or no
            mitigation reads them (`Mitigation.uses_logits`).
        log: Named detached scalars for the history, under these names (`rewards/margins`, `kl`).
    """

    loss: Tensor
    logits: Tensor | None
    log: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One domain at its place in a stream, as hooks see it.

    Args:
        index: Position in the stream, from 0. (Folders and rows of the score matrix count from 1; row 0 is the base.)
        domain: Name of the domain.
        stages: Length of the stream T.
        seed: The run's seed.
        steps: Optimizer steps of the stage.
        batch_size: Examples per optimizer step, over all devices and accumulated micro-batches.
        kind: Of the domain.
    """

    index: int
    domain: str
    stages: int
    seed: int
    steps: int
    batch_size: int
    kind: Kind = "generative"


def untyped(value: object) -> Any:
    """The same object for type checkers that know less of it than we do: a model that PEFT or transformers extends."""
    return value


class ExampleView(Sequence[Example]):
    """Examples by position, made when they are asked for; not sliced."""

    @abstractmethod
    def at(self, position: int) -> Example:
        """The example at a position."""

    def __getitem__(self, position: Any) -> Any:
        return self.at(position)

    def name_at(self, position: int) -> tuple[str, str]:
        """(domain, row) of the example at a position; a view that need not make the example for it does not."""
        example = self.at(position)
        return example.domain, example.row

    def own(self) -> Sequence[Example]:
        """The same examples with no place given to those of an earlier stage."""
        return self
