"""torch's autograd functions with types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.autograd import Function
from torch.autograd.function import once_differentiable as _once_differentiable

__all__ = ["apply", "once_differentiable"]

_Call = TypeVar("_Call", bound=Callable[..., Any])


def apply(function: type[Function], *arguments: Any) -> Any:
    """A node of the graph: `function.forward` on some arguments."""
    node: Any = function
    return node.apply(*arguments)


def once_differentiable(backward: _Call) -> _Call:
    """Refuse a second derivative of a node instead of computing a wrong one."""
    once: Any = _once_differentiable
    wrapped: _Call = once(backward)
    return wrapped
