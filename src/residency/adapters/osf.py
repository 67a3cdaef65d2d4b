"""Orthogonal subspace fine-tuning (Nayak et al. 2025, "Sculpting Subspaces"): PEFT's tuner, wrapped anew per domain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from peft import OSFConfig
from peft.tuners.osf import OSFLayer
from torch import Tensor, nn

from residency.adapters.base import Adapter, Observe, copy_state
from residency.adapters.peft_tools.wrapping import wrap
from residency.core.tensors import Computed
from residency.core.types import Stage, Tensors, untyped

__all__ = ["OSF", "project"]

_ADAPTER = "default"
# PEFT's names below an adapted layer.
_BASE = "base_layer.weight"
_LIVE = f"osf_svd_params.{_ADAPTER}."


class OSF(Adapter):
    """Keep the directions in which a weight is large, train the rest.

    Every weight W (out, in) is split by its singular values, W = U_h S_h V_h + U_l S_l V_l. The high part stays;
    U_l (out, q), S_l (q,), V_l (q, in) train, q = min(out, in) - preserved rank, with U_l orthogonal to U_h and V_l to
    V_h. Before the next domain the update becomes part of W, which is split again: what was learnt may then rank
    among the directions to keep.

    There is no reference model: from the second domain on, the frozen part is not the pretrained weight.

    Args:
        config: `effective_rank` is the preserved rank: a number, a share of min(out, in), or null for half of it.
        project_update: Project what the optimizer did, not only its gradient. PEFT projects the gradient, and under
            Adam updates made from projected gradients leave the subspace (spec/adapters 1.2).
        schedule: `constant`, or `growing`: preserve the share (t - 1) / T in domain t of T, at least rank 1.
    """

    uses_stream_length = True

    provides = frozenset({"averageable", "mergeable", "exportable"})

    def __init__(
        self,
        *,
        config: OSFConfig,
        project_update: bool = True,
        schedule: Literal["constant", "growing"] = "constant",
    ) -> None:
        self.config = config
        self.project_update = project_update
        self.schedule = schedule

    def attach(self, model: nn.Module) -> nn.Module:
        """Split every target.

        Raises:
            UserError: The model is quantised, or PEFT refuses it.
        """
        return wrap(model, self.config)

    @torch.no_grad()
    def begin_stage(self, model: nn.Module, stage: Stage, observe: Observe) -> None:
        """From the second domain on: make the update part of the weight and split it again."""
        if stage.index == 0 and self.schedule == "constant":
            return
        for layer in _layers(model).values():
            layer.merge()
            rank = layer.effective_rank[_ADAPTER]
            if self.schedule == "growing":
                rank = max(1, min(layer.in_features, layer.out_features) * stage.index // stage.stages)
            self._split(layer, rank)

    def _split(self, layer: OSFLayer, rank: int) -> None:
        # What PEFT remembers about the former split would count the update twice.
        layer.merged_adapters.clear()
        layer._detach_hooks()
        layer.update_layer(_ADAPTER, rank, config=self.config)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The frozen weights too: from the second domain on they are not the backbone's."""
        return {name: tensor.detach() for name, tensor in _owned(model).items()}

    @torch.no_grad()
    def load_state(self, model: nn.Module, state: Tensors) -> None:
        """Copy a stored state into the model, bit for bit; the preserved rank may have been another one.

        Raises:
            UserError: Names or shapes differ.
        """
        for path, layer in _layers(model).items():
            stored = state.get(f"{path}.{_LIVE}S_low")
            rank = 0 if stored is None else min(layer.in_features, layer.out_features) - len(stored)
            if rank > 0 and rank != layer.effective_rank[_ADAPTER]:
                self._split(layer, rank)
        copy_state(_owned(model), state, owner=type(self).__name__)

    @torch.no_grad()
    def transform_update(self, model: nn.Module, before: Tensors, after: Tensors) -> Tensors:
        """Project the step of U_l and V_l onto the complement of what is kept."""
        if not self.project_update:
            return after
        final, buffers = dict(after), dict(model.named_buffers())
        for path in _layers(model):
            for factor in ("U", "V"):
                name = f"{path}.{_LIVE}{factor}_low"
                kept = buffers.get(f"{path}._osf_{factor}_high.{_ADAPTER}")
                free = buffers[f"{path}._osf_{factor}_low_init.{_ADAPTER}"]
                step = project(after[name] - before[name], kept=kept, free=free, rows=factor == "V")
                final[name] = before[name] + step
        return final

    def weights(self, model: nn.Module, state: Tensors) -> Tensors:
        """Every adapted weight as a whole, (out, in), computed when read."""

        def compute(name: str) -> Tensor:
            return _whole(state, name.removesuffix(f".{_BASE}"))

        return Computed([name for name in state if name.endswith(f".{_BASE}")], compute)

    @torch.no_grad()
    def load_weights(self, model: nn.Module, weights: Tensors) -> Mapping[str, float]:
        """Shift the frozen part so that the whole is as wanted; exact up to rounding."""
        live = _owned(model)
        for name in weights:
            update = _whole(live, name.removesuffix(f".{_BASE}")) - live[name]
            live[name].copy_(weights[name] - update)
        return {}

    def merge(self, model: nn.Module) -> nn.Module:
        """The plain transformers model; `model` is used up."""
        result: nn.Module = untyped(model).merge_and_unload(safe_merge=True)
        return result

    def export(self, model: nn.Module, path: Path) -> None:
        """A folder that `AutoModelForCausalLM.from_pretrained` loads: an update alone would need the weights before."""
        plain = untyped(model).get_base_model()
        tensors = dict(plain.named_parameters())
        final = {n.replace(f".{_BASE}", ".weight"): t.detach() for n, t in tensors.items() if "osf_" not in n}
        for name in _layers(plain):
            final[f"{name}.weight"] = _whole(_owned(plain), name)
        plain.save_pretrained(path, state_dict=final)


def project(step: Tensor, *, kept: Tensor | None, free: Tensor, rows: bool) -> Tensor:
    """The part of a step that leaves the kept directions alone.

    Args:
        step: (out, q), or (q, in) with `rows`.
        kept: Orthonormal basis of what is kept, (out, k) or (k, in); `None` where `free` spans the whole complement.
        free: Orthonormal basis of the split's own trainable directions, (out, q) or (q, in); read without `kept` only.
        rows: The directions are rows, not columns.

    Returns:
        As `step`.
    """
    if rows:
        return project(step.T, kept=None if kept is None else kept.T, free=free.T, rows=False).T
    return free @ (free.T @ step) if kept is None else step - kept @ (kept.T @ step)


def _layers(model: nn.Module) -> dict[str, OSFLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, OSFLayer)}


def _owned(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of the adapted layers, the live leaves among them."""
    layers = tuple(f"{path}." for path in _layers(model))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if name.startswith(layers)}


def _whole(tensors: Tensors, path: str) -> Tensor:
    """W + U_l S_l V_l - (U_l S_l V_l at the split), (out, in)."""
    now, then = (
        [tensors[f"{path}.{form.format(factor)}"] for factor in ("U", "S", "V")]
        for form in (_LIVE + "{}_low", f"_osf_{{}}_low_init.{_ADAPTER}")
    )
    return tensors[f"{path}.{_BASE}"] + ((now[0] * now[1]) @ now[2] - (then[0] * then[1]) @ then[2])
