"""One optimizer per parameter, stepped inside the backward pass: at any time there is one gradient, not all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["LayerwiseOptimizer"]


class LayerwiseOptimizer(Optimizer):
    """Steps every parameter as soon as its gradient is complete, and frees the gradient.

    The gradient of a parameter is complete when it arrives (a tied one is summed first), so nothing may be added to it
    later: no accumulation over micro-batches, no clipping by a global norm, nobody who reads gradients.

    Outside of `step` a backward pass leaves gradients alone, as usual.

    Args:
        parameters: Leaves that require a gradient.
        make: The optimizer of one parameter.
    """

    def __init__(self, *, parameters: Iterable[Tensor], make: Callable[[Tensor], Optimizer]) -> None:
        self.parts = {parameter: make(parameter) for parameter in parameters}
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {})
        self._link()
        self._stepping = False
        self._handles = [p.register_post_accumulate_grad_hook(self._arrived) for p in self.parts]

    def _link(self) -> None:
        # The very dicts of the parts: what a scheduler writes here is what they step with.
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]

    def _arrived(self, parameter: Tensor) -> None:
        if self._stepping:
            self.parts[parameter].step()
            parameter.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Run forward and backward; every parameter is stepped on the way.

        Raises:
            RuntimeError: Without a closure, as the backward pass would be over already.
        """
        if closure is None:
            raise RuntimeError("a layer-wise optimizer steps inside the backward pass: call step(closure)")
        self._stepping = True
        try:
            with torch.enable_grad():
                return closure()
        finally:
            self._stepping = False

    def close(self) -> None:
        """Take the hooks off the parameters; the optimizer is of no use afterwards."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, in torch's own layout; one group per parameter."""
        parts = [part.state_dict() for part in self.parts.values()]
        return {
            "state": {i: part["state"][0] for i, part in enumerate(parts) if part["state"]},
            "param_groups": [{**part["param_groups"][0], "params": [i]} for i, part in enumerate(parts)],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore every part."""
        for i, (part, group) in enumerate(zip(self.parts.values(), state_dict["param_groups"], strict=True)):
            entry = state_dict["state"].get(i)
            state = {} if entry is None else {0: entry}
            part.load_state_dict({"state": state, "param_groups": [{**group, "params": [0]}]})
        self._link()
