"""Packed or padded: asked of the model itself, not of a list of architectures."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import nn

from residency.backbones.base import Backbone
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Example, Layout

__all__ = ["LayoutChoice", "choose_layout"]

LayoutChoice = Literal["auto", "packed", "padded"]

# Relative to the size of the logits; rounding stays below 1e-4 in float32, a leak between examples is far above.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_LOOSE = 5e-2


def choose_layout(choice: LayoutChoice, backbone: Backbone, model: nn.Module) -> tuple[Layout, str]:
    """The layout of all batches, and why.

    Args:
        choice: What the config says.
        backbone: Runs the model.
        model: With its adapter.

    Raises:
        UserError: `packed` was asked for and examples would see each other.
    """
    if choice == "padded":
        return "padded", "asked for"
    problem = _packing_problem(backbone, model)
    if not problem:
        return "packed", "exact on this model (checked)"
    if choice == "packed":
        raise UserError(
            f"model.layout is packed, and {problem}",
            why="examples in one row would not be independent of each other",
            fix="set model.layout to auto or padded",
        )
    return "padded", problem


@torch.no_grad()
def _packing_problem(backbone: Backbone, model: nn.Module) -> str:
    """Why packing is not exact on a model; empty if it is."""
    size = int(getattr(getattr(model, "config", None), "vocab_size", 32))
    # Long enough that a state-space or sliding-window layer would carry something across the border.
    ids = [tuple((7 * i + 3 * j + 1) % size for i in range(6 + j)) for j in range(3)]
    # With a branch each: some models keep plain segments apart by their positions, but let branches see each other.
    examples = [
        Example.of(domain="check", row=str(j), prompt=x[:3], completion=x[3:], alternatives=((*x[1:3], j),))
        for j, x in enumerate(ids)
    ]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        padded = backbone.logits(model, make_batch(examples, layout="padded").to(device))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model that packing does not suit may say so before it fails
            packed = backbone.logits(model, make_batch(examples, layout="packed").to(device))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return f"this model does not run packed rows ({type(error).__name__})"
    finally:
        model.train(training)
    difference = float((packed - padded).abs().max() / padded.abs().max().clamp_min(1e-9))
    if difference <= _TOLERANCE.get(padded.dtype, _LOOSE):
        return ""
    return f"packed and padded logits differ by {difference:.1e} on this model"
