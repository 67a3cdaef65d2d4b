"""MIGU (Du et al. 2024): only outputs of large magnitude are updated.

In every step and layer m_i = mean over tokens of |y_i| for output feature i. Rows with m_i below the quantile τ of
their layer keep their weights: 1 - τ of the rows move. Different domains excite different features, so they disturb
each other less. (The paper divides m by its sum first, which changes no order.)

It is the UPDATE that is masked: under Adam a row without gradient still moves by momentum and by weight decay.

With LoRA, rows of A are judged by A x, rows of B by what the whole layer puts out, x W + s B A x. The first domain is
not masked. Norms and embeddings are not matrices of layers and move freely; a bias goes with its row.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from residency.adapters.algebra.covariance import tokens_of
from residency.core.errors import UserError
from residency.core.ranks import sum_by_name
from residency.core.types import Batch, Capability, Tensors
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.constraints.linear_maps import kept_share, linear_maps
from residency.mitigations.contract import StageModule

__all__ = ["MIGU", "kept_rows"]


def kept_rows(magnitudes: Tensor, quantile: float) -> Tensor:
    """Which rows are updated.

    Args:
        magnitudes: (out,) mean |y_i|.
        quantile: τ in [0, 1].

    Returns:
        (out,) bool, a share 1 - τ of it true, to within one.
    """
    return magnitudes >= torch.quantile(magnitudes, quantile)


class MIGU(Mitigation):
    """Magnitude-based gradient updating, on updates.

    Args:
        threshold: τ, share of the rows of every layer that are not updated in a step, in [0, 1]. 0 = off.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"rows"})
    update_order: ClassVar[int] = 1
    decoder_only = "it matches what a layer sees with the tokens of a batch; encoder and decoder see different ones"
    not_on_classifiers = "it matches what a layer sees with the tokens of a batch; a classifier reads more than these"
    requires: frozenset[Capability] = frozenset({"linear"})
    alternative: ClassVar[str] = "configs/mitigation/replay.yaml, or an adapter of linear layers (lora, full)"

    def __init__(self, *, threshold: float = 0.7) -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise UserError(
                f"MIGU with threshold={threshold}",
                why="it is the share of rows that are left as they are, in [0, 1]",
                fix="use the paper's threshold: 0.7, or 0 for off",
            )
        self.threshold = threshold
        self.add_state("kept", torch.ones(()))
        # Only alive inside a step; checkpoints are written between steps.
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._batch: Batch | None = None
        self._hooks: list[RemovableHandle] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch what the layers put out."""
        self._close()
        if not self.touches_training(pl_module.stage.index):
            return
        model = pl_module.model
        for path in sorted({*self._watched(model, pl_module.adapter.trainable(model)).values()}):
            self._hooks.append(model.get_submodule(path).register_forward_hook(partial(self._watch, path)))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Watch no more."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Watch no more."""
        self._close()

    def transform_batch(self, module: StageModule, batch: Batch) -> Batch:
        """The batch itself; its padding is not looked at."""
        self._batch = batch
        return batch

    def transform_update(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Undo the step in the rows of small magnitude."""
        sums, self._sums = self._sums, {}
        if not sums:
            return after
        # Of the tokens of the whole step, on whichever rank they were read.
        whole = sum_by_name(
            {path: torch.cat([total, total.new_tensor([count])]) for path, (total, count) in sums.items()}
        )
        rows = {path: kept_rows(found[:-1] / found[-1], self.threshold) for path, found in whole.items()}
        places, final = linear_maps(module.model, after), dict(after)
        for name, path in self._watched(module.model, after).items():
            if path not in rows:  # an expert that no token went to
                continue
            mask = places[name].over_outputs(rows[path])
            final[name] = torch.where(mask, after[name], before[name])
            bias = f"{places[name].owner}.bias"
            if bias in after:
                final[bias] = torch.where(rows[path], after[bias], before[bias])
        self.state["kept"] = kept_share(before, after, final)
        return final

    def touches_training(self, index: int) -> bool:
        """Not at threshold 0."""
        return self.threshold > 0 and super().touches_training(index)

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """`kept`: share of the last update's norm."""
        kept = self.state["kept"]
        assert isinstance(kept, Tensor)
        return {"kept": float(kept)}

    def _watched(self, model: nn.Module, names: Any) -> dict[str, str]:
        """Trainable matrix -> path of the module whose output judges its rows."""
        places = linear_maps(model, names)
        return {name: place.layer if place.kind == "B" else place.owner for name, place in places.items()}

    def _watch(self, path: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        # Teachers and reference gradients run in evaluation mode: only what is trained on counts.
        if not (module.training and torch.is_grad_enabled()):
            return
        y = _tokens(output.detach(), self._batch).abs().float()
        total, count = self._sums.get(path, (0, 0))
        self._sums[path] = (total + y.sum(0), count + len(y))

    def _close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._sums, self._batch = [], {}, None


def _tokens(y: Tensor, batch: Batch | None) -> Tensor:
    """(tokens, out) without padding; all positions of a layer that does not run on the batch as it is (a head)."""
    mask = None if batch is None else batch.attention_mask
    if batch is None or mask is None or y.shape[:2] != mask.shape:
        return y.reshape(-1, y.shape[-1])
    return tokens_of(y, batch)
