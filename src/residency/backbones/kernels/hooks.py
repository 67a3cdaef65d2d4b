"""Does somebody look at what passes through a module?"""

from __future__ import annotations

from torch import nn

__all__ = ["watched"]


def watched(module: nn.Module) -> bool:
    """Whether forward or backward hooks are registered on this module itself."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
