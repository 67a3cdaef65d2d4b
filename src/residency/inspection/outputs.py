"""How the model's answers have changed: KL to the base (E14) and calibration (E20) at the answer tokens of probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from residency.core.types import Batch
from residency.inspection.base import Observer, StageSnapshot
from residency.inspection.calibration_metrics import TokenAnswers, calibration, token_answers
from residency.inspection.drift_metrics import kl_from_top, top_log_probabilities

__all__ = ["AnswerCalibration", "KLToBase"]


class KLToBase(Observer):
    """E14: forward KL(π_0‖π_t) in nats per answer token, on fixed rows of every domain and probe.

    Records {column: nats}, and `mean` over columns. Of the base's distribution the likeliest tokens and one bucket for
    the rest are kept, so the value is a lower bound, exact where `top` covers the vocabulary.

    Args:
        tokens: Of all columns together, prompts included.
        top: Tokens per position that are kept of the base.
        since: What π_0 is: the `pretrained` model, or what the `stage` began with (RL's Razor, arXiv 2509.04259,
            compares a new task's policy with where its learning started).
    """

    def __init__(
        self, *, tokens: int = 2048, top: int = 256, since: Literal["pretrained", "stage"] = "pretrained"
    ) -> None:
        self.tokens = tokens
        self.top = top
        self.since = since
        self._base: list[tuple[Tensor, Tensor]] = []

    def after(self, snapshot: StageSnapshot) -> Mapping[str, Any]:
        """Drift of the state after stage k; nothing before training, where it is 0."""
        if snapshot.k == 0:
            return {}
        if self.since == "stage":
            with snapshot.before_stage() as model:
                self._base = self._read(
                    snapshot,
                    lambda column, batch: (
                        snapshot.logits(model, batch)
                        if snapshot.k == 1
                        else snapshot.served(column, batch, snapshot.module.forward)
                    ),
                )
        elif not self._base:
            with snapshot.pretrained() as model:
                self._base = self._read(snapshot, lambda _, batch: snapshot.logits(model, batch))
        parts: dict[str, list[Tensor]] = {}
        for (column, batch), (ids, log_p) in zip(snapshot.batches(tokens=self.tokens), self._base, strict=True):
            logits = snapshot.served(column, batch, snapshot.module.forward)
            parts.setdefault(column, []).append(kl_from_top(ids, log_p, logits))
        columns = {name: float(torch.cat(values).mean()) for name, values in parts.items()}
        return {"columns": columns, "mean": sum(columns.values()) / len(columns)}

    def _read(self, snapshot: StageSnapshot, logits: Callable[[str, Batch], Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [
            top_log_probabilities(logits(column, batch), k=self.top)
            for column, batch in snapshot.batches(tokens=self.tokens)
        ]


class AnswerCalibration(Observer):
    """E20: expected calibration error (15 bins of equal mass), Brier score and NLL at answer tokens, per column.

    Records {column: {ece, brier, nll, tokens}}, before training too: the change over the stream is what counts.

    Args:
        tokens: Of all columns together, prompts included.
        bins: Of the ECE.
    """

    def __init__(self, *, tokens: int = 4096, bins: int = 15) -> None:
        self.tokens = tokens
        self.bins = bins

    def after(self, snapshot: StageSnapshot) -> Mapping[str, Any]:
        """Calibration of the state after stage k, or before training."""
        if snapshot.k:
            parts = self._read(snapshot, lambda column, batch: snapshot.served(column, batch, snapshot.module.forward))
        else:
            with snapshot.pretrained() as model:
                parts = self._read(snapshot, lambda column, batch: snapshot.logits(model, batch))
        return {"columns": {name: asdict(calibration(answers, bins=self.bins)) for name, answers in parts.items()}}

    def _read(self, snapshot: StageSnapshot, logits: Callable[[str, Batch], Tensor]) -> dict[str, list[TokenAnswers]]:
        parts: dict[str, list[TokenAnswers]] = {}
        for column, batch in snapshot.batches(tokens=self.tokens):
            parts.setdefault(column, []).append(token_answers(logits(column, batch), batch.targets))
        return parts
