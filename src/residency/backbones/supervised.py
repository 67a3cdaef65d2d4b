"""Forward passes whose head is computed at the supervised positions only, which is exact."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from residency.backbones.kernels.last_layer import only_at
from residency.core.types import Batch

__all__ = ["supervised_logits", "supervised_nll"]

_HEAD_ROWS = 32


def supervised_logits(model: nn.Module, batch: Batch) -> Tensor:
    """(M, V) logits of a batch of either layout."""
    if batch.layout == "packed":
        # One branch per example: its targets are one after another.
        plain = batch.target_at.is_cuda and all(len(example.branches) <= 1 for example in batch.examples)
        with only_at(batch.target_at, distinct=plain):
            out = model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=None,
                segments=batch.segments,
                logits_to_keep=batch.target_at,
                use_cache=False,
            )
        result: Tensor = out.logits[0]
        return result
    width = batch.input_ids.shape[1]
    # Columns count from the end of a row: an adapter may have put virtual tokens in front of it.
    row, column = batch.target_at // width, batch.target_at % width - width
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if not _keeps_logits(model):
        result = model(**inputs).logits[row, column]
        return result
    columns, at = column.unique(return_inverse=True)
    result = model(**inputs, logits_to_keep=columns).logits[row, at]
    return result


def supervised_nll(model: nn.Module, batch: Batch) -> Tensor:
    """(M,) nats of a packed batch; where several labels go on from one position, the head is computed there once."""
    positions, at = batch.target_at.unique(return_inverse=True)
    logits = supervised_logits(model, replace(batch, target_at=positions))
    # A few rows at a time, so that the exponentials stay in the cache.
    total = torch.cat([part.float().logsumexp(-1) for part in logits.split(_HEAD_ROWS)])
    return total[at] - logits[at, batch.targets].float()


def _keeps_logits(model: nn.Module) -> bool:
    unwrap: Any = getattr(model, "get_base_model", None)
    core = unwrap() if unwrap else model
    return "logits_to_keep" in inspect.signature(core.forward).parameters
