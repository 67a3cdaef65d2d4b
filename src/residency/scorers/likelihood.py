"""Scores of likelihoods: nothing is generated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from residency.core.types import Row
from residency.scorers.base import Answer, Scorer

__all__ = ["NLL", "Accuracy", "BitsPerByte", "NormalisedAccuracy", "label_is_best"]


def label_is_best(branch_nll: Tensor) -> bool:
    """Whether the true completion (branch 0) is strictly the most likely of all labels.

    Args:
        branch_nll: (1 + alternatives,) negative log-likelihood of each whole label, summed over its tokens, the end
            token included, so that labels compete as complete answers and length needs no correction.
    """
    return bool((branch_nll[0] < branch_nll[1:]).all())


@dataclass(frozen=True, kw_only=True)
class NLL(Scorer):
    """Mean negative log-likelihood of the completion's tokens, end token included; a column's mean is over tokens."""

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"nll": {}}
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "nats per completion token"
    needs: ClassVar[Literal["likelihood"]] = "likelihood"

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) nats per token."""
        return [answer.nll / answer.tokens for answer in answers]

    def weights(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[int]:
        """(rows,) tokens."""
        return [answer.tokens for answer in answers]


@dataclass(frozen=True, kw_only=True)
class Accuracy(Scorer):
    """Whether the row's own label, whole and with its end token, is strictly the most likely of all labels.

    Likelihoods are summed over tokens, so that long labels are at no advantage; a tie is wrong.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"accuracy": {}}
    unit: ClassVar[str] = "share of rows whose own label is the most likely one"
    needs: ClassVar[Literal["likelihood"]] = "likelihood"
    labels: ClassVar[Literal["best"]] = "best"

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 or 1."""
        return [float(bool(answer.best)) for answer in answers]


@dataclass(frozen=True, kw_only=True)
class NormalisedAccuracy(Scorer):
    """Accuracy with each label's log-likelihood divided by its length: what rewards long labels that are easy to go on.

    The harness of EleutherAI (`acc_norm`) divides by characters and reads no end token; here the label counts whole.

    Args:
        by: `tokens` (end token included) or `bytes` (UTF-8, of the label's text).
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "accuracy_norm": {"by": "tokens"},
        "accuracy_norm_bytes": {"by": "bytes"},
    }
    unit: ClassVar[str] = "share of rows whose own label is the most likely one per unit of length"
    needs: ClassVar[Literal["likelihood"]] = "likelihood"
    labels: ClassVar[Literal["all"]] = "all"

    by: Literal["tokens", "bytes"] = "tokens"

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 or 1; a tie is wrong."""
        scores = []
        for row, answer in zip(rows, answers, strict=True):
            per_unit = {label: one.nll / getattr(one, self.by) for label, one in answer.labels.items()}
            own = per_unit.pop(row.completion)
            scores.append(float(all(own < other for other in per_unit.values())))
        return scores


@dataclass(frozen=True, kw_only=True)
class BitsPerByte(Scorer):
    """Bits that the model needs per UTF-8 byte of the completion, without its end token.

    The only likelihood that may be compared between models of different tokenizers. A column's mean is over bytes.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"bits_per_byte": {}}
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "bits per UTF-8 byte of the completion"
    needs: ClassVar[Literal["likelihood"]] = "likelihood"
    text_likelihood: ClassVar[bool] = True

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) bits per byte; nll 3 ln 2 on each of 3 tokens that spell 9 bytes is 1."""
        return [answer.text_nll / (math.log(2) * answer.text_bytes) for answer in answers]

    def weights(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[int]:
        """(rows,) bytes."""
        return [answer.text_bytes for answer in answers]
