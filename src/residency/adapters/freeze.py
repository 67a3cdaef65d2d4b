"""Full fine-tuning with a part of the model frozen: the bottom blocks, parameters by name, the embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from residency.adapters.base import Adapter
from residency.backbones.structure import blocks, embeddings, matching, names_of, refuse_quantised
from residency.core.errors import UserError
from residency.core.types import Tensors, untyped

__all__ = ["Freeze", "bottom_blocks", "frozen_names"]


def bottom_blocks(bottom: int | float, blocks: int) -> int:
    """How many blocks a count (a whole number) or a share (a fraction, rounded to the nearest block) freezes.

    Args:
        bottom: `4` = four blocks, `0.5` = half of them.
        blocks: How many there are.

    Raises:
        UserError: More blocks than there are, or a share outside 0 ... 1.
    """
    count = round(bottom * blocks) if isinstance(bottom, float) else bottom
    if not 0 <= count <= blocks:
        raise UserError(
            f"model.adapter.bottom = {bottom} of a model with {blocks} blocks",
            why="it is a number of blocks, or a share of them between 0.0 and 1.0",
            fix=f"give a whole number from 0 to {blocks}, or a fraction such as 0.5",
        )
    return int(count)


def frozen_names(
    model: nn.Module,
    *,
    bottom: int | float,
    freeze: list[str] | None,
    train_only: list[str] | None,
    train_embeddings: bool,
) -> frozenset[str]:
    """Names of the parameters that must not move. Freezing wins; a tied tensor is frozen under all of its names.

    Args:
        model: The pretrained model.
        bottom: See `bottom_blocks`.
        freeze: Regular expressions of names that do not move.
        train_only: Regular expressions of the names that may move; `None` = all.
        train_embeddings: Whether token and position tables, and a head tied to them, move.
    """
    names = names_of(model)
    frozen: set[str] = set()
    if bottom:
        stack = list(blocks(model))
        lowest = tuple(f"{name}." for name in stack[: bottom_blocks(bottom, len(stack))])
        frozen |= {key for key, aliases in names.items() if any(alias.startswith(lowest) for alias in aliases)}
    frozen |= matching(freeze or [], names, option="model.adapter.freeze")
    if train_only is not None:
        frozen |= {*names} - matching(train_only, names, option="model.adapter.train_only")
    if not train_embeddings:
        frozen |= embeddings(model)
    return frozenset(frozen)


class Freeze(Adapter):
    """Full fine-tuning with a part of the model frozen.

    What a stage may move is what none of the four choices freezes. Frozen bottom blocks also save their backward pass.

    Args:
        bottom: Blocks from the input on that do not move: a whole number counts them, a fraction is their share.
        freeze: Regular expressions, searched in parameter names: what matches does not move.
        train_only: Regular expressions, searched in parameter names: only what matches may move; `null` = everything.
        train_embeddings: Whether token and position embeddings move. A head that is tied to them goes with them.
    """

    provides = frozenset({"fixed_coordinates", "averageable", "linear", "mergeable", "exportable"})
    trains_in_parts = True

    def __init__(
        self,
        *,
        bottom: int | float = 0,
        freeze: list[str] | None = None,
        train_only: list[str] | None = None,
        train_embeddings: bool = True,
    ) -> None:
        self.bottom = bottom
        self.freeze = freeze
        self.train_only = train_only
        self.train_embeddings = train_embeddings

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze what the choices freeze.

        Raises:
            UserError: A pattern matches nothing, nothing is left to train, or what is left is quantised.
        """
        frozen = frozen_names(
            model,
            bottom=self.bottom,
            freeze=self.freeze,
            train_only=self.train_only,
            train_embeddings=self.train_embeddings,
        )
        parameters = dict(model.named_parameters())
        moving = [name for name in parameters if name not in frozen]
        if not moving:
            raise UserError(
                f"{type(self).__name__} freezes all {len(parameters)} parameters of {type(model).__name__}",
                why="nothing is left to train",
                fix="lower model.adapter.bottom or shorten model.adapter.freeze; a head that is tied to the embeddings "
                "is frozen with them",
            )
        refuse_quantised(model, moving, what="training a part")
        for name, parameter in parameters.items():
            parameter.requires_grad_(name not in frozen)
        return model

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
