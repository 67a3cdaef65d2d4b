"""How the hidden states of fixed tokens have changed (E18)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from residency.core.types import Batch
from residency.inspection.base import Observer, StageSnapshot
from residency.inspection.drift_metrics import linear_cka

__all__ = ["RepresentationDrift"]


class RepresentationDrift(Observer):
    """E18: 1 - CKA (linear, debiased) between the hidden states before training and now, block by block.

    Records `by_block` (the outputs of the transformer's blocks on the same tokens), `mean`, and `tokens`.

    Args:
        tokens: Tokens of all columns together whose states are compared; below 1000 the estimate is noisy. Memory is
            tokens × width per block, and twice tokens² while one block is compared.
    """

    decoder_only = "it compares one stack of blocks at the tokens of a batch"
    not_on_classifiers = "it compares blocks at the tokens of a batch, and a classifier reads more than these"

    def __init__(self, *, tokens: int = 1024) -> None:
        self.tokens = tokens
        self._base: list[Tensor] = []

    def after(self, snapshot: StageSnapshot) -> Mapping[str, Any]:
        """Drift of the state after stage k; nothing before training, where it is 0."""
        if snapshot.k == 0:
            return {}
        if not self._base:
            with snapshot.pretrained() as model:
                self._base = self._states(snapshot, lambda column, batch: _read(snapshot, model, batch))
        live = snapshot.module.model
        now = self._states(
            snapshot, lambda column, batch: snapshot.served(column, batch, partial(_read, snapshot, live))
        )
        drift = [1.0 - linear_cka(then, state) for then, state in zip(self._base, now, strict=True)]
        return {"by_block": drift, "mean": sum(drift) / len(drift), "tokens": now[0].shape[0]}

    def _states(self, snapshot: StageSnapshot, read: Callable[[str, Batch], Tensor]) -> list[Tensor]:
        """(tokens, D) per block, on the CPU."""
        parts = [read(column, batch) for column, batch in snapshot.batches(tokens=self.tokens)]
        return list(torch.cat(parts)[: self.tokens].unbind(1))


def _read(snapshot: StageSnapshot, model: nn.Module, batch: Batch) -> Tensor:
    """(n, blocks, D) hidden states of one forward pass."""
    with _watched(model) as seen:
        snapshot.logits(model, batch)
    return torch.stack([_tokens(state, batch) for state in seen], 1)


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """The output of every transformer block of one forward pass, in order."""
    # The stack is the longest list of modules in any model that transformers builds.
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    stack = max(stacks, key=len, default=nn.ModuleList())
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        seen.append(state.detach())

    handles = [block.register_forward_hook(keep) for block in stack]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tokens(state: Tensor, batch: Batch) -> Tensor:
    """(n, D) of the positions that are no padding."""
    # Virtual tokens, where an adapter puts some in front, are not among those that are compared.
    state = state[:, -batch.input_ids.shape[1] :]
    flat = state.reshape(-1, state.shape[-1])
    if batch.attention_mask is not None:
        flat = flat[batch.attention_mask.reshape(-1).bool()]
    return flat.float().cpu()
