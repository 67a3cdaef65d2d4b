"""Full fine-tuning: every parameter moves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from residency.adapters.base import Adapter
from residency.core.errors import UserError
from residency.core.types import Tensors, untyped

__all__ = ["Full"]


class Full(Adapter):
    """Train all parameters of the backbone.

    There is no free reference model: the pretrained weights are overwritten, so a mitigation that needs `reference`
    is refused.
    """

    provides = frozenset({"fixed_coordinates", "averageable", "linear", "mergeable", "exportable"})
    trains_in_parts = True

    def attach(self, model: nn.Module) -> nn.Module:
        """Make every parameter trainable.

        Raises:
            UserError: The weights are quantised and cannot take a gradient.
        """
        quantised = [name for name, p in model.named_parameters() if not p.is_floating_point()]
        if quantised:
            raise UserError(
                f"full fine-tuning of a quantised backbone ({len(quantised)} tensors, first {quantised[0]!r})",
                why="4-bit and 8-bit weights are integers and have no gradient",
                fix="set model.backbone.quantisation to null, or use configs/adapter/lora.yaml on the quantised base",
            )
        return model.requires_grad_(True)

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
