"""GaLore (Zhao et al. 2024): full fine-tuning whose optimizer works in a low-rank subspace of every gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from residency.adapters.base import Adapter, Observe, OptimizerFactory
from residency.adapters.optim import GaLoreOptimizer, LayerwiseOptimizer
from residency.backbones.structure import blocks, matching, names_of, refuse_quantised
from residency.core.errors import UserError
from residency.core.types import Stage, Tensors, untyped

__all__ = ["GaLore", "projected_names"]


def projected_names(model: nn.Module, *, exclude: list[str] | None) -> list[str]:
    """The matrices that GaLore projects: all of the blocks, but neither embeddings nor the head.

    Args:
        model: The pretrained model.
        exclude: Regular expressions, searched in these names: what matches is stepped plainly.
    """
    stack = tuple(f"{name}." for name in blocks(model))
    matrices = {name: (name,) for name, p in model.named_parameters() if p.ndim == 2 and name.startswith(stack)}
    left_out = matching(exclude or [], matrices, option="model.adapter.exclude")
    return [name for name in matrices if name not in left_out]


class GaLore(Adapter):
    """Train all parameters; the matrices of the blocks through a low-rank subspace of their gradients.

    Wraps the optimizer of the config, whatever it is (an 8-bit one too): its moments have the low rank. Everything
    that is no matrix of a block is stepped plainly. With the default scale the learning rate is about 4 to 10 times
    that of full fine-tuning.

    Args:
        rank: Of the subspace; capped at the smaller side of a matrix.
        gap: Optimizer steps between two new subspaces (each costs one SVD per matrix).
        scale: Factor of the projected update.
        exclude: Regular expressions, searched in parameter names: what matches is stepped plainly.
        layerwise: Step every parameter inside the backward pass and free its gradient at once. Needs
            `trainer.gradient_clip_val: null` and no accumulation, and no mitigation may need gradients or updates.
    """

    provides = frozenset({"fixed_coordinates", "averageable", "linear", "mergeable", "exportable"})

    def __init__(
        self,
        *,
        rank: int = 128,
        gap: int = 200,
        scale: float = 0.25,
        exclude: list[str] | None = None,
        layerwise: bool = False,
    ) -> None:
        if rank < 1 or gap < 1 or scale <= 0:
            raise UserError(
                f"model.adapter.rank={rank}, gap={gap}, scale={scale}",
                why="a subspace has at least one dimension, lives at least one step, and its update is not zero",
                fix="give rank >= 1, gap >= 1 and scale > 0; defaults are 128, 200 and 0.25",
            )
        self.rank = rank
        self.gap = gap
        self.scale = scale
        self.exclude = exclude
        self.steps_in_backward = layerwise
        self._layerwise: LayerwiseOptimizer | None = None

    def attach(self, model: nn.Module) -> nn.Module:
        """Make every parameter trainable.

        Raises:
            UserError: The weights are quantised, or `exclude` matches nothing.
        """
        refuse_quantised(model, names_of(model), what="full fine-tuning (GaLore)")
        projected_names(model, exclude=self.exclude)
        return model.requires_grad_(True)

    def optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        """The user's optimizer, wrapped."""
        self._close()
        matrices = {*projected_names(model, exclude=self.exclude)}
        live = self.trainable(model)
        projected = [p for name, p in live.items() if name in matrices]
        plain = [p for name, p in live.items() if name not in matrices]
        if not self.steps_in_backward:
            return self._wrap(projected, plain, factory)
        at_low_rank = {id(p) for p in projected}

        def make(parameter: Tensor) -> Optimizer:
            return self._wrap([parameter], [], factory) if id(parameter) in at_low_rank else factory([parameter])

        self._layerwise = LayerwiseOptimizer(parameters=live.values(), make=make)
        return self._layerwise

    def step_bytes(self, model: nn.Module) -> int:
        """Of every projected matrix a proxy and its gradient at low rank; of the largest its singular vectors, and the
        update that is lifted from them.
        """
        live = self.trainable(model)
        shapes = [live[name].shape for name in projected_names(model, exclude=self.exclude)]
        thin = sum(min(self.rank, *shape) * max(shape) for shape in shapes)
        largest = max((math.prod(shape) for shape in shapes), default=0)
        return 4 * int(2 * thin + 3 * largest)

    def _wrap(self, projected: list[Tensor], plain: list[Tensor], factory: OptimizerFactory) -> GaLoreOptimizer:
        options = {"rank": self.rank, "gap": self.gap, "scale": self.scale}
        return GaLoreOptimizer(projected=projected, plain=plain, factory=factory, **options)  # type: ignore[arg-type]

    def end_stage(self, model: nn.Module, stage: Stage, observe: Observe) -> None:
        """Take the hooks of the layer-wise variant off the model."""
        self._close()

    def _close(self) -> None:
        if self._layerwise is not None:
            self._layerwise.close()
            self._layerwise = None

    def weights(self, model: nn.Module, state: Tensors) -> Tensors:
        """The parameters themselves."""
        return state

    @torch.no_grad()
    def load_weights(self, model: nn.Module, weights: Tensors) -> Mapping[str, float]:
        """Copy the weights; exact."""
        self.load_state(model, weights)
        return {}

    def merge(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model

    def export(self, model: nn.Module, path: Path) -> None:
        """A folder that `AutoModelForCausalLM.from_pretrained` loads."""
        untyped(model).save_pretrained(path)
