"""The contract of a backbone: load it, run it, name it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from residency.backbones.outline import Outline
from residency.backbones.work import Work
from residency.core.losses import token_nll
from residency.core.types import Batch, Layout

if TYPE_CHECKING:
    from residency.domains.stream_data import StreamData

__all__ = ["Backbone", "Family", "Sampling"]

Family = Literal["decoder", "encoder-decoder", "classifier"]
"""What reads a batch: one stack that sees prompt and completion as one text; an encoder and a decoder; or a model that
reads prompts alone and chooses a label.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How continuations are drawn.

    Args:
        seed: Of all draws of one call.
        temperature: Logits are divided by it.
        top_k: Draw from the k most likely tokens; 0 = from all.
    """

    seed: int
    temperature: float = 1.0
    top_k: int = 0


class Backbone(ABC):
    """A pretrained model and its tokenizer. It tells `work` of every pass that it runs."""

    family: ClassVar[Family] = "decoder"

    learned: int = 0
    """How many domains of the stream have been begun, where a pass depends on it: which labels a classifier knows."""

    task_id_at_test: bool = False
    """Whether scoring a row needs to know its domain."""

    draws_from_seed: bool = False
    """Whether the model before training has parts that are drawn from the run's seed."""

    def for_stream(self, data: StreamData) -> Backbone:
        """The backbone that a stream needs, before it is loaded: a classifier's head has a row per label.

        Raises:
            UserError: It cannot learn these domains.
        """
        return self

    def seeded(self, seed: int) -> Backbone:
        """The backbone of a run of this seed, before it is loaded."""
        return self

    def label_names(self) -> tuple[str, ...]:
        """What the outputs of the model mean, one by one; empty where they are tokens."""
        return ()

    def check_attached(self, model: nn.Module) -> None:
        """Whether a model works with its adapter.

        Raises:
            UserError: It does not.
        """

    @cached_property
    def work(self) -> Work:
        """What its models have computed: the cost of a run is read from it."""
        return Work()

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use."""

    @abstractmethod
    def load(self) -> nn.Module:
        """A fresh copy of the pretrained model, on the CPU, in evaluation mode."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(M, V) logits at the supervised positions of a batch, nowhere else."""

    def nll(self, model: nn.Module, batch: Batch) -> Tensor:
        """(M,) negative log-likelihood of each target in nats, float32, for training: where nobody reads the logits."""
        return token_nll(self.logits(model, batch), batch.targets)

    def target_nll(self, model: nn.Module, batch: Batch) -> Tensor:
        """(M,) negative log-likelihood of each target in nats, float32, for scoring: without a gradient."""
        return token_nll(self.logits(model, batch), batch.targets)

    def output_layer(self, model: nn.Module) -> nn.Module | None:
        """The layer that makes logits of hidden states, its adapter with it; `None` if nobody knows it."""
        unwrap: Any = getattr(model, "get_base_model", None)
        core: Any = unwrap() if unwrap else model
        head: nn.Module | None = core.get_output_embeddings()
        return head

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """(M, ...) what the output layer makes of every target's position, as it is."""
        return self.logits(model, batch)

    def stepping(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, the optimizer makes one step; for what it must leave alone."""
        return nullcontext()

    def distilled(self, model: nn.Module, batch: Batch) -> Tensor:
        """(M', V') logits that a student keeps of the model as the stage before left it: those of every target."""
        return self.logits(model, batch)

    @abstractmethod
    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        layout: Layout = "padded",
    ) -> list[list[int]]:
        """Continuations, one per prompt, without the end token: greedy, or drawn as `sampling` says.

        A function of the model, the prompts and the sampling alone: the global generator is left as it was.

        Args:
            model: With its adapter, in evaluation mode.
            prompts: At least one token each.
            max_new_tokens: Most tokens of a continuation; one that is as long as this was cut off.
            sampling: How to draw; `None` = greedy.
            layout: `packed` if the model was found to run packed rows (`backbones.layout`); faster for greedy ones.
        """

    def outline(self) -> Outline | None:
        """Its modules without their weights, for estimates before a run; `None` = nobody can say."""
        return None

    def longest_text(self) -> int | None:
        """Most tokens of a text, prompt and completion together; `None` = there is no limit, or nobody knows it."""
        return None

    def packing_problem(self) -> str:
        """Why packed rows are not exact on the model that was loaded last; empty if nothing is known against them."""
        return ""

    def left_out(self) -> Mapping[str, str]:
        """{kernel: why it is not exact on the model that was loaded last}."""
        return {}

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """What identifies the pretrained state: hashes of weights and tokenizer, dtype, quantisation."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Name, licence and remarks for the record."""
