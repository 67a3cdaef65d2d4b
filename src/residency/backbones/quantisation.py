"""Frozen weights in 4 or 8 bit, by bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from residency.core.errors import UserError
from residency.core.types import untyped

__all__ = ["Quantisation", "forbid_repacking", "loading_options", "refuse_unquantised"]


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How bitsandbytes stores the frozen weights (QLoRA, Dettmers et al. 2023).

    Args:
        kind: `nf4` (4 bit, normal-float levels), `fp4` or `int8`.
        double: Quantise the quantisation constants too (4.127 instead of 4.5 bit per weight; 4-bit kinds only).
        compute_dtype: Of the matrix products (4-bit kinds only).
    """

    kind: Literal["nf4", "fp4", "int8"] = "nf4"
    double: bool = True
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"


def loading_options(quantisation: Quantisation) -> dict[str, Any]:
    """What `from_pretrained` is told."""
    return {"quantization_config": _bitsandbytes(quantisation), "device_map": _device_map()}


def _bitsandbytes(quantisation: Quantisation) -> Any:
    from transformers import BitsAndBytesConfig

    if quantisation.kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantisation.kind,
        bnb_4bit_use_double_quant=quantisation.double,
        bnb_4bit_compute_dtype=getattr(torch, quantisation.compute_dtype),
    )


def _device_map() -> dict[str, Any]:
    # Quantised layers must be made where they stay: one rank, one device, never "auto".
    return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}


def forbid_repacking(model: nn.Module) -> None:
    """Keep 4-bit weights in the form that has an autograd formula."""
    # On CPUs with AVX512-BF16 an evaluation pass repacks 4-bit weights in place into a form that has no autograd:
    # every later training step would lose its gradients (bitsandbytes 0.50, spec/adapters A3).
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            untyped(module).support_avx512bf16_for_cpu = False


def refuse_unquantised(model: nn.Module, quantisation: Quantisation) -> None:
    """Only linear layers are quantised; a mixture whose experts are one tensor keeps them as they are.

    Raises:
        UserError: More than a quarter of the layers' weights stay in full precision.
    """
    outside = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = untyped(model).get_output_embeddings()
    outside |= {id(p) for p in head.parameters()} if head is not None else set()
    stays, total = [], 0
    for name, parameter in model.named_parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
        if id(parameter) in outside or parameter.dim() < 2:
            continue
        total += torch.Size(shape).numel()
        if parameter.is_floating_point():
            stays.append((name, parameter.numel()))
    if 4 * sum(size for _, size in stays) > total:
        raise UserError(
            f"model.backbone.quantisation is {quantisation.kind}, and {sum(size for _, size in stays) / total:.0%} of "
            f"the weights in the layers stay in full precision, first {stays[0][0]!r}",
            why="bitsandbytes quantises plain linear layers only: not experts that are one tensor per layer, not "
            "linear layers of a class of their own",
            fix="set model.backbone.quantisation to null, or choose a model of plain linear layers",
        )
