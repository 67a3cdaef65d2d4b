"""A model without its weights: its modules on torch's meta device, and how many bytes the weights would take."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from residency.backbones.loading import load_config
from residency.backbones.quantisation import Quantisation

__all__ = ["Outline", "outline_causal", "quantised_bits"]

_BLOCK = 64  # weights that share a constant of bitsandbytes' 4-bit kinds


class Outline(NamedTuple):
    """What a model will be.

    Attributes:
        model: Its modules, every parameter on the meta device: shapes and names, no values.
        stored: Bytes of its weights as they will be stored.
        width: Bytes of one activation, before any autocast.
        quantised: Whether some of its weights are.
    """

    model: nn.Module
    stored: int
    width: int
    quantised: bool


def outline_causal(folder: Path, *, dtype: str, quantisation: Quantisation | None) -> Outline:
    """What `load_causal` would make, read from the config alone.

    Args:
        folder: As `save_pretrained` writes it.
        dtype: Of weights and computation; `auto` = as the config says.
        quantisation: Of the linear layers but the head.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    named = getattr(config, "dtype", None) or torch.float32
    chosen = named if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=chosen)
    model.tie_weights()
    cut = {} if quantisation is None else _quantised(model, quantisation)
    stored = sum(cut.get(id(p), p.numel() * p.element_size()) for p in model.parameters())
    stored += sum(b.numel() * b.element_size() for b in model.buffers())
    return Outline(model.eval(), stored, chosen.itemsize, quantisation is not None)


def _quantised(model: Any, quantisation: Quantisation) -> dict[int, int]:
    """Parameter -> bytes, of what bitsandbytes stores in few bits."""
    kept = {id(model.get_output_embeddings().weight), id(model.get_input_embeddings().weight)}
    bits = quantised_bits(quantisation)
    weights = (m.weight for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) not in kept)
    # int8 has a float32 per row besides.
    return {id(w): round(w.numel() * bits / 8) + (4 * len(w) if quantisation.kind == "int8" else 0) for w in weights}


def quantised_bits(quantisation: Quantisation) -> float:
    """Bits per weight, the constants of its block included (Dettmers et al. 2023, section 3)."""
    if quantisation.kind == "int8":
        return 8.0
    return 4 + (8 / _BLOCK + 32 / (_BLOCK * 256) if quantisation.double else 32 / _BLOCK)
