"""Sequence classifiers: one pass over a prompt, and one logit per label of the stream.

Everything else in this project speaks of tokens that follow a prompt. Here a completion is one token, whose number is
the row of its label in the head: the logits at the one supervised position are those of the labels, their negative
log-likelihood is the classification loss, and replay, Fisher information and scores need not know more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, reduce
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from residency.backbones.base import Backbone, Family, Sampling
from residency.backbones.classifier_head import head_tensors, load_classifier
from residency.backbones.fingerprint import tokenizer_fingerprint, weights_fingerprint
from residency.backbones.labels import LabelTokenizer, StreamLabels, stream_labels
from residency.backbones.loading import load_config, load_tokenizer, longest_text
from residency.backbones.locations import model_folder
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.losses import IMPOSSIBLE
from residency.core.types import Batch, Example, Layout
from residency.domains.stream_data import StreamData

__all__ = ["Classifier"]

_PACKING = "a classifier answers once per row of its batch"


class Classifier(Backbone):
    """A pretrained encoder or decoder with a classification head: BERT, RoBERTa, Llama ... `ForSequenceClassification`.

    The head has a row per label of the stream's domains and probes. It is part of what is trained and stored; the
    exported model is transformers' own, with `id2label`. Labels of later domains have rows from the start, which are
    left as they were drawn: until its domain begins, a label's probability is 0, as if its row was not there.

    Args:
        path: A local folder in the format of `save_pretrained`, or a hub id.
        revision: Branch, tag or commit of a hub id.
        head: `shared`: one text is one label, whoever uses it, and all labels of the domains begun so far compete
            (class-incremental; domain-incremental where domains have the same labels). A domain that has not been begun
            is scored with its own labels beside them. `masked`: every domain has rows of its own, and only they compete
            (task-incremental: the domain of a row is told). `data.classes` says which labels compete for the accuracy.
        new_head: What happens to the head of a checkpoint that is a classifier: by default its rows are used for the
            labels that the stream has under the same text, and one without any such label is refused; true draws all.
        dtype: Of weights and computation; `auto` = as stored.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about 1.3 x the time.
    """

    family: ClassVar[Family] = "classifier"
    draws_from_seed = True

    def __init__(
        self,
        *,
        path: str,
        revision: str | None = None,
        head: Literal["shared", "masked"] = "shared",
        new_head: bool = False,
        dtype: Literal["float32", "bfloat16", "auto"] = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        self.path, self.revision = path, revision
        self.head, self.new_head = head, new_head
        self.dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.task_id_at_test = head == "masked"
        self._labels: StreamLabels | None = None
        self._seed = 0
        self._remark = "sequence classifier"

    # -- the stream ---------------------------------------------------------------------------------------------

    def for_stream(self, data: StreamData) -> Classifier:
        """The same backbone with a head for the labels of a stream.

        Raises:
            UserError: A domain has no labels, or no more than one.
        """
        labels = stream_labels(data, masked=self.head == "masked")
        if labels == self._labels:
            return self
        made = copy.copy(self)
        made._labels = labels
        made.__dict__.pop("tokenizer", None)
        return made

    def seeded(self, seed: int) -> Classifier:
        """The same backbone with another head of its own."""
        made = copy.copy(self)
        made._seed = seed
        return made

    @property
    def labels(self) -> StreamLabels:
        """Of the stream.

        Raises:
            TypeError: It has not met one.
        """
        if self._labels is None:
            raise TypeError("a classifier has labels once it has met the stream's data (Backbone.for_stream)")
        return self._labels

    def label_names(self) -> tuple[str, ...]:
        """As `id2label` has them."""
        return self.labels.names

    # -- files --------------------------------------------------------------------------------------------------

    @cached_property
    def folder(self) -> Path:
        """Local folder of the model.

        Raises:
            UserError: There is no such folder, or the hub id is neither cached nor reachable.
        """
        return model_folder(self.path, self.revision)

    @cached_property
    def _inner(self) -> Any:
        return load_tokenizer(self.folder)

    @cached_property
    def tokenizer(self) -> LabelTokenizer:
        """The tokenizer of the folder for prompts; a label is one token."""
        return LabelTokenizer(self._inner, self._labels, added=sum(map(len, self._around)))

    @cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer puts in front of a text and behind it."""
        whole, bare = self._inner("a").input_ids, self._inner("a", add_special_tokens=False).input_ids
        at = next((k for k in range(len(whole)) if whole[k : k + len(bare)] == bare), 0)
        return tuple(whole[:at]), tuple(whole[at + len(bare) :])

    def longest_text(self) -> int | None:
        """Positions of the model without those of added tokens, and with the label, which is not read."""
        config = load_config(self.folder)
        # RoBERTa's family counts positions from behind the padding token's number.
        first = config.pad_token_id + 1 if "roberta" in config.model_type or config.model_type == "camembert" else 0
        return longest_text(config) - first - sum(map(len, self._around)) + 1

    def load(self) -> nn.Module:
        """A fresh pretrained model on the CPU, with the head as the run's seed draws it.

        Raises:
            UserError: transformers has no classifier for it, it cannot be loaded whole, or its own head fits no label.
        """
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        model, self._remark = load_classifier(
            self.folder, self.labels, seed=self._seed, new_head=self.new_head, dtype=dtype
        )
        if model.config.pad_token_id is None:
            # Plain transformers refuses batches of a decoder without one.
            known = self._inner.pad_token_id
            model.config.pad_token_id = self.tokenizer.eos_token_id if known is None else known
        if self.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        loaded: nn.Module = model.eval()
        return loaded

    def check_attached(self, model: nn.Module) -> None:
        """The head is trained by the adapter, and the adapter is inside the model.

        Raises:
            UserError: It stays as it was drawn, or what the adapter puts in front of the text would not be read.
        """
        config = getattr(model, "active_peft_config", None)
        if bool(getattr(config, "is_prompt_learning", False)):
            raise UserError(
                f"model.adapter with {type(config).__name__} on a sequence classifier",
                why="its virtual tokens would be what the head reads, or hide where a text ends",
                fix="use configs/adapter/lora.yaml or another adapter of layers",
            )
        if not head_tensors(model):
            raise UserError(
                "model.adapter on a sequence classifier: it leaves the head as it is",
                why="a head that was drawn and is never trained tells labels apart by chance",
                fix="use configs/adapter/full.yaml or lora.yaml, which train the head",
            )

    @contextmanager
    def stepping(self, model: nn.Module) -> Iterator[None]:
        """Rows of labels that no domain has had so far stay as they were drawn: weight decay would shrink them."""
        flags = torch.ones(len(self.labels.keys), dtype=torch.bool)
        flags[[row for group in self.labels.known(self.learned) for row in group]] = False
        kept = [(p, later := flags.to(p.device), p.detach()[later]) for p in head_tensors(model)]
        yield
        with torch.no_grad():
            for parameter, later, values in kept:
                parameter[later] = values

    # -- passes -------------------------------------------------------------------------------------------------

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(M, V) logits of the stream's labels for each target; of those that cannot be chosen `IMPOSSIBLE`."""
        rows = self.outputs(model, batch)
        domains = [batch.examples[i].domain for i in batch.target_example.tolist()]
        competing = self.labels.competing(domains, batch.targets, learned=self.learned)
        return rows.masked_fill(~competing, IMPOSSIBLE)

    def distilled(self, model: nn.Module, batch: Batch) -> Tensor:
        """(M x G, V) logits of the labels that the stage before knew; a masked head has one choice per domain: G."""
        rows = self.outputs(model, batch)
        known = self.labels.known(self.learned - 1)
        flags = torch.zeros(len(known), rows.shape[1], dtype=torch.bool, device=rows.device)
        for flag, group in zip(flags, known, strict=True):
            flag[group] = True
        return rows[:, None].masked_fill(~flags, IMPOSSIBLE).flatten(0, 1)

    def output_layer(self, model: nn.Module) -> nn.Module:
        """The head's last layer, in PEFT's copy where that is what trains."""
        layer: nn.Module = reduce(getattr, _core(model).head_path.split("."), _core(model))
        return layer

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """(M, V) logits of all labels, whichever compete."""
        return self._rows(model, batch)[batch.target_example]

    def _rows(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, V) plain logits of each example, which is read once however many labels it has."""
        if batch.layout == "packed":
            raise TypeError(_PACKING)
        front, end = self._around
        prompts = [(*front, *example.prompt, *end) for example in batch.examples]
        read = make_batch(
            [Example.of(domain="", row="", prompt=prompt, completion=(0,)) for prompt in prompts], layout="padded"
        ).to(batch.input_ids.device)
        core = _core(model)
        if not hasattr(core, "score"):
            out: Tensor = core(input_ids=read.input_ids, attention_mask=read.attention_mask).logits
        else:
            # transformers looks for the last token that is no padding by its number, which a text may hold as well.
            inputs = {"input_ids": read.input_ids, "attention_mask": read.attention_mask, "use_cache": False}
            hidden = core.base_model(**inputs).last_hidden_state
            last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=hidden.device)
            out = core.score(hidden[torch.arange(len(prompts), device=hidden.device), last])
        self.work.passed(model, read, out)
        return out

    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        layout: Layout = "padded",
    ) -> list[list[int]]:
        """A classifier writes nothing.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "a sequence classifier was asked to write",
            why="it has a head for labels and none for tokens",
            fix="score it (`residency test` gives nll and accuracy), or use residency.backbones.CausalLM",
        )

    def packing_problem(self) -> str:
        """Why batches are padded."""
        return _PACKING

    # -- identity -----------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, str]:
        """Hashes of weights and tokenizer, dtype, and the labels of the head."""
        known = {} if self._labels is None else {"labels": sha256(repr(self._labels.keys).encode()).hexdigest()}
        head = {"head": f"{self.head}, {'new' if self.new_head else 'matched'}"}
        return {"weights": self._weights, "dtype": self.dtype, "tokenizer": self._tokens, **head, **known}

    @cached_property
    def _weights(self) -> str:
        return weights_fingerprint(self.folder)

    @cached_property
    def _tokens(self) -> str:
        return tokenizer_fingerprint(self._inner, self.folder)

    def describe(self) -> dict[str, str]:
        """Name, licence and remarks."""
        described = {"name": self.path, "licence": "see the model's card", "remark": self._remark}
        return described if self.revision is None else {**described, "revision": self.revision}


def _core(model: nn.Module) -> Any:
    """transformers' own model, inside of what PEFT puts around it."""
    inner: Any = getattr(model, "get_base_model", None)
    return model if inner is None else inner()
