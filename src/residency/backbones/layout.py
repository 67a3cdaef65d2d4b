"""Packed or padded: asked of the model itself, not of a list of architectures.

The model without an adapter was compared with the untouched one when it was loaded (`residency.backbones.exactness`);
here both layouts are compared with each other once more with the adapter, which may do what packed rows do not bear.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from residency.backbones.base import Backbone
from residency.backbones.loading import longest_text
from residency.backbones.probes import probe_texts
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Batch, Layout

__all__ = ["LayoutChoice", "choose_layout"]

LayoutChoice = Literal["auto", "packed", "padded"]

# Relative to the size of the logits; rounding stays below 1e-4 in float32, a leak between examples is far above.
_TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-8}
_LOOSE = 5e-2


def choose_layout(choice: LayoutChoice, backbone: Backbone, model: nn.Module) -> tuple[Layout, str]:
    """The layout of all batches, and why.

    Args:
        choice: What the config says.
        backbone: Runs the model.
        model: With its adapter.

    Raises:
        UserError: The adapter does not run on the model, or `packed` was asked for and examples would see each other.
    """
    known = backbone.packing_problem()
    problem = _packing_problem(backbone, model, try_packed=choice != "padded" and not known)
    if choice == "padded":
        return "padded", "asked for"
    problem = known or problem
    without = "".join(f"; without the kernel of {name}: {why}" for name, why in backbone.left_out().items())
    if not problem:
        return "packed", f"exact on this model (checked against the untouched one){without}"
    if choice == "packed":
        raise UserError(
            f"model.layout is packed, and {problem}",
            why="examples in one row would not be independent of each other",
            fix="set model.layout to auto or padded",
        )
    return "padded", problem + without


@torch.no_grad()
def _packing_problem(backbone: Backbone, model: nn.Module, *, try_packed: bool) -> str:
    """Why packing is not exact on a model with its adapter; empty if it is, or is not tried."""
    config = getattr(model, "config", None)
    size = int(getattr(config, "vocab_size", 32))
    whole, ends = probe_texts(vocabulary=size, longest=longest_text(config) if config is not None else 64)
    examples = [*whole[1:], *ends]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        padded = _padded(backbone, model, make_batch(examples, layout="padded").to(device))
        if not try_packed:
            return ""
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


def _padded(backbone: Backbone, model: nn.Module, batch: Batch) -> Tensor:
    try:
        return backbone.logits(model, batch)
    except Exception as error:  # adapters and models fail together in their own ways
        raise UserError(
            f"the adapter does not run on {type(model).__name__}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}",
            why="it was put on a part of the model that is called in a way it does not know (a router, often)",
            fix="name the layers it should adapt, for example target_modules: [q_proj, v_proj], or leave that part out "
            "with exclude_modules",
        ) from error
