"""What follows training: the weights that the next stage starts from, and those that are served.

What is served (scored, written with, exported) may differ from what training goes on from: trained unmerged, merged to
be served.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from residency.core.tensors import snapshot
from residency.core.types import Tensors
from residency.engine.folds import mixed_weights
from residency.mitigations.base import Mitigation
from residency.mitigations.contract import StageModule

__all__ = ["merge_stage", "served_of", "serving"]


@torch.no_grad()
def merge_stage(
    module: StageModule, active: Mapping[str, Sequence[Mitigation]], before: Tensors, base: Tensors
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Replace the weights of a trained stage by what the mitigations make of them, and find what is served.

    Args:
        module: As the last step left it; afterwards at the weights that training goes on from.
        active: Hook -> the mitigations that take part in it, in order.
        before: The adapter's state as the stage found it; empty if nobody merges.
        base: The adapter's state before the first stage; empty if nobody asks for it.

    Returns:
        What the adapter reports of taking weights over (the error of a refactorisation), and the state of the adapter
        that is served, empty where it is the trained one.
    """
    training, served = active["transform_weights"], active["served_weights"]
    old, first = ({n: t.to(module.device) for n, t in state.items()} for state in (before, base))
    log = mixed_weights(module, training, old, first) if training else {}
    if not served:
        return log, {}
    adapter, model = module.adapter, module.model
    trained = snapshot(adapter.state(model))
    more = mixed_weights(module, served, old, first, hook="served_weights")
    state = snapshot(adapter.state(model))
    adapter.load_state(model, trained)
    if state.keys() == trained.keys() and all(torch.equal(state[name], trained[name]) for name in state):
        return log, {}
    return log | {f"served/{name}": value for name, value in more.items()}, state


@contextmanager
def serving(module: Any) -> Iterator[None]:
    """Inside, the model is what its last stage serves.

    Args:
        module: A `ContinualModule`; comes back at the weights that training goes on from.
    """
    if not module.served:
        yield
        return
    trained = snapshot(module.adapter.state(module.model))
    module.adapter.load_state(module.model, module.served)
    try:
        yield
    finally:
        module.adapter.load_state(module.model, trained)


def served_of(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a stored stage serves: its own weights unless it says otherwise."""
    return dict(tree.get("served") or tree["weights"])
