"""Which row of a classification head is which label, over a stream of domains. Pure functions of the stream's data.

M = rows of a batch, V = rows of the head, one per label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.domains.base import Domain
from residency.domains.joint import Joint
from residency.domains.stream_data import StreamData
from residency.domains.template import Template

__all__ = ["LabelTokenizer", "StreamLabels", "stream_labels"]


@dataclass(frozen=True)
class StreamLabels:
    """The labels of a stream.

    The order of the rows does not depend on the order of the domains, so that streams of the same domains have the
    same head.

    Args:
        by_column: {domain or probe: {the domain a label belongs to: its labels}}; a joint domain has several.
        order: Domains as they are learned.
        masked: Whether every domain has rows of its own; if not, one text is one row, whoever uses it.
    """

    by_column: Mapping[str, Mapping[str, tuple[str, ...]]]
    order: tuple[str, ...]
    masked: bool

    @cached_property
    def keys(self) -> tuple[tuple[str, str], ...]:
        """(domain, label) of every row; the domain is empty where rows are shared."""
        return tuple(sorted({key for parts in self.by_column.values() for key in self._keys(parts)}))

    @property
    def names(self) -> tuple[str, ...]:
        """What `id2label` says: the label; of a masked head `domain: label`."""
        return tuple(f"{domain}: {label}" if domain else label for domain, label in self.keys)

    def row(self, domain: str, label: str) -> int:
        """The row of a label.

        Raises:
            UserError: No domain of the stream has it.
        """
        key = (domain if self.masked else "", label)
        if key not in self._rows:
            raise UserError(
                f"label {label!r} of {domain}",
                why=f"the head has rows for {', '.join(map(repr, self.names[:8]))}",
                fix="put the label into the domain's rows before the run begins",
            )
        return self._rows[key]

    def known(self, learned: int) -> list[list[int]]:
        """Rows that compete with each other after so many domains: one list, or one per domain of a masked head."""
        seen = [self.by_column[name] for name in self.order[:learned]]
        if self.masked:
            parts = {domain: self._group(domain, labels) for each in seen for domain, labels in each.items()}
            return list(parts.values())
        rows = sorted({self._rows[key] for parts in seen for key in self._keys(parts)})
        return [rows] if rows else []

    def competing(self, domains: Sequence[str], targets: Tensor, *, learned: int) -> Tensor:
        """Which labels compete for each row of a batch.

        Args:
            domains: (M,) the column of each row; of one that is not in the stream all labels compete.
            targets: (M,) its label.
            learned: How many domains have been begun.

        Returns:
            (M, V) flags. Masked: the labels of the domain that the target belongs to. Shared: those of all domains
            begun so far, and of the row's own.
        """
        width = len(self.keys)
        if self.masked:
            blocks = self._blocks.to(targets.device)
            known = torch.tensor([name in self.by_column for name in domains], device=targets.device)
            return (blocks == blocks[targets.clamp_max(width - 1)][:, None]) | ~known[:, None]
        seen = self._flags(row for group in self.known(learned) for row in group)
        own = {name: seen | self._own(name) for name in {*domains}}
        return torch.stack([own[name] for name in domains]).to(targets.device)

    def _own(self, column: str) -> Tensor:
        if column not in self.by_column:
            return torch.ones(len(self.keys), dtype=torch.bool)
        return self._flags(self._rows[key] for key in self._keys(self.by_column[column]))

    def _flags(self, rows: Iterable[int]) -> Tensor:
        flags = torch.zeros(len(self.keys), dtype=torch.bool)
        flags[[*rows]] = True
        return flags

    def _group(self, domain: str, labels: Iterable[str]) -> list[int]:
        return sorted(self.row(domain, label) for label in labels)

    @cached_property
    def _rows(self) -> dict[tuple[str, str], int]:
        return {key: row for row, key in enumerate(self.keys)}

    @cached_property
    def _blocks(self) -> Tensor:
        names = sorted({domain for domain, _ in self.keys})
        return torch.tensor([names.index(domain) for domain, _ in self.keys])

    def _keys(self, parts: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
        return [(domain if self.masked else "", label) for domain, labels in parts.items() for label in labels]


class LabelTokenizer:
    """A tokenizer that reads prompts, and writes a completion as one token: the row of its label in the head.

    Args:
        inner: The model's tokenizer.
        labels: Of the stream; `None` where it is not known yet.
        added: Tokens that the model wants around every text, which are not part of a prompt here.
    """

    bos_token_id = None
    """What stands before a text is put there by the backbone."""

    def __init__(self, inner: Any, labels: StreamLabels | None, *, added: int) -> None:
        self._inner, self._labels = inner, labels
        known = inner.eos_token_id, inner.sep_token_id, inner.pad_token_id
        self.eos_token_id = next((token for token in known if token is not None), 0)
        # A label is counted and not read.
        self.model_max_length = int(inner.model_max_length) - added + 1

    def label_token(self, domain: str, label: str) -> int:
        """The row of a label.

        Raises:
            UserError: The stream has no such label.
        """
        if self._labels is None:
            raise TypeError("labels are known once the backbone has met the stream's data (Backbone.for_stream)")
        return self._labels.row(domain, label)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)


def stream_labels(data: StreamData, *, masked: bool) -> StreamLabels:
    """The labels of all domains and probes.

    Raises:
        UserError: A domain cannot be classified, or the head would have nothing to choose from.
    """
    columns = {name: _parts(name, domain) for name, domain in data.columns.items()}
    for name, parts in columns.items():
        for domain in parts.values():
            _check_domain(name, domain)
    if data.shots:
        raise _refusal(
            f"data.shots={data.shots}", "a classifier reads one text and no answered examples", "set it to 0"
        )
    if masked and data.classes != "own":
        raise _refusal(
            f"data.classes={data.classes} with head: masked",
            "a masked head is told the domain, so that only its own labels compete",
            "set data.classes to own, or head to shared",
        )
    found = {name: {part: domain.labels() for part, domain in parts.items()} for name, parts in columns.items()}
    labels = StreamLabels(by_column=found, order=tuple(data.order), masked=masked)
    single = [part for parts in found.values() for part, of_part in parts.items() if len(of_part) < 2]
    if len(labels.keys) < 2 or (masked and single):
        raise _refusal(
            f"one label in {single[0] if single else 'the stream'}",
            "with one label there is nothing to choose, and transformers takes one output for a regression",
            "give every domain at least two labels" + (", or set head to shared" if masked else ""),
        )
    return labels


def _parts(name: str, domain: Domain) -> Mapping[str, Domain]:
    return domain.domains if isinstance(domain, Joint) else {name: domain}


def _check_domain(name: str, domain: Domain) -> None:
    if domain.kind != "label":
        raise _refusal(
            f"data.domains.{name} is {domain.kind}",
            "a classifier answers with one label of a closed set and writes no text",
            "give rows with prompt and label (kind: label), or use residency.backbones.CausalLM",
        )
    if not isinstance(domain.template, Template):
        raise _refusal(
            f"data.domains.{name}.template is {type(domain.template).__name__}",
            "a classifier reads a text, not a conversation",
            "set template: plain",
        )
    for label, scorer in domain.scorers.items():
        if scorer.needs != "likelihood" or scorer.text_likelihood or scorer.rewards:
            raise _refusal(
                f"data.domains.{name}.scorers has {label!r}",
                "it reads texts or tokens that a model writes, and a classifier writes none",
                "score labels: nll, accuracy",
            )


def _refusal(got: str, why: str, fix: str) -> UserError:
    return UserError(f"{got} with a sequence classifier", why=why, fix=fix)
