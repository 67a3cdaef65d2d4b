"""torch's own counter of FLOPs, with the operations of a CPU that it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["counter"]

_ops: Any = torch.ops.aten


def _forward(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _backward(*shapes: Sequence[int], **_: Any) -> int:
    dy, query, key, value = shapes[:4]
    return int(sdpa_backward_flop_count(dy, query, key, value))


def _added(total: Sequence[int], one: Sequence[int], other: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * one[0] * one[1] * other[1]


def counter() -> FlopCounterMode:
    """Counts what runs inside of it, attention kernels and products in place included."""
    known = {
        _ops._scaled_dot_product_flash_attention_for_cpu: _forward,
        _ops._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
        _ops.addmm_: _added,
    }
    return FlopCounterMode(display=False, custom_mapping=known)
