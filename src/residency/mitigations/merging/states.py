"""What the merging mitigations share: the states of finished stages, and arithmetic on named tensors.

A state is remembered as the adapter stores it (LoRA: its factors), as training left it, and looked at in the adapter's
averaging space when it is merged. In that space τ_i = θ_i - θ_0 is the task vector of state i, θ_0 the weights before
the first stage. Names are merged one at a time, when read; integer tensors are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from residency.core.errors import UserError
from residency.core.tensors import Computed, snapshot
from residency.core.types import Tensors
from residency.mitigations.base import Into, Mitigation
from residency.mitigations.contract import StageModule

__all__ = [
    "check_into",
    "check_last",
    "kept_states",
    "merged",
    "merged_vectors",
    "remember",
    "stage_weights",
    "state_bytes",
    "take_over",
    "unless_first",
]


def remember(kept: Tensors, state: Tensors, *, index: int, last: int | None) -> dict[str, Tensor]:
    """Add the state of a stage to those that are kept.

    Args:
        kept: Earlier ones, as this function returns them.
        state: As `Adapter.state` returns it; copied.
        index: Of the stage.
        last: How many states are merged at a time: the newest `last` - 1 are kept for the next one; `None` = all.
    """
    found = {**kept, **{f"{index:04d}/{name}": tensor for name, tensor in snapshot(state).items()}}
    stages = sorted({name.partition("/")[0] for name in found})
    wanted = {*stages} if last is None else {*stages[len(stages) - (last - 1) :]} if last > 1 else set()
    return {name: tensor for name, tensor in found.items() if name.partition("/")[0] in wanted}


def kept_states(kept: Tensors) -> list[dict[str, Tensor]]:
    """The states that were remembered, oldest first."""
    states: dict[str, dict[str, Tensor]] = {}
    for key in sorted(kept):
        index, _, name = key.partition("/")
        states.setdefault(index, {})[name] = kept[key]
    return list(states.values())


def stage_weights(mitigation: Mitigation, module: StageModule, after: Tensors, *, last: int | None) -> list[Tensors]:
    """The states of earlier stages in the adapter's averaging space, oldest first, and `after`.

    What `after` is becomes the model's state and joins `mitigation.state["kept"]`: what the mixers before this one made
    of the stage; as training left it, bit for bit, where there are none.
    """
    kept = mitigation.state["kept"]
    assert isinstance(kept, dict)
    adapter, model = module.adapter, module.model
    found = [adapter.weights(model, state) for state in kept_states(kept)]
    take_over(module, after)
    mitigation.state["kept"] = remember(kept, adapter.state(model), index=module.stage.index, last=last)
    return [*found, after]


def take_over(module: StageModule, after: Tensors) -> None:
    """Bring the model to what the mixers before this one made of the stage.

    Where they made nothing of it the model is left alone: an adapter that makes its factors anew finds the same
    weights, but not the same bits.
    """
    if after is not module.trained_weights:
        module.adapter.load_weights(module.model, after)


def merged(like: Tensors, merge: Callable[[str], Tensor]) -> Tensors:
    """Named tensors that are merged when read; integer ones are those of `like`."""

    def compute(name: str) -> Tensor:
        own = like[name]
        return merge(name).to(own.dtype) if own.is_floating_point() else own

    return Computed(like, compute)


def merged_vectors(
    base: Tensors, tuned: Sequence[Tensors], merge: Callable[[str, list[Tensor]], Tensor], *, strength: float
) -> Tensors:
    """θ_0 + λ merge(τ_1, ..., τ_n), name by name.

    Args:
        base: θ_0.
        tuned: θ_1 ... θ_n, same names and shapes, at least one.
        merge: (name, task vectors in float32 or finer) -> one vector.
        strength: λ; at 0 the very object `base` is returned.
    """
    if strength == 0:
        return base

    def compute(name: str) -> Tensor:
        start = base[name].float()
        return start + strength * merge(name, [weights[name].float() - start for weights in tuned])

    return merged(tuned[-1], compute)


def state_bytes(trainable: int) -> int:
    """Bytes of a state that is remembered, in float32."""
    return 4 * trainable


def unless_first(module: StageModule, *, first: bool) -> bool:
    """Whether to merge after the running stage: the first one only if asked for."""
    return first or module.stage.index > 0


def check_into(into: Into, *, owner: str) -> Into:
    """Where the merged weights go.

    Raises:
        UserError: Nowhere that exists.
    """
    if into not in ("train", "serve"):
        raise UserError(
            f"{owner} with into={into!r}",
            why="merged weights are what training goes on from (train), or only what is scored and exported (serve)",
            fix="give into: train or into: serve",
        )
    return into


def check_last(last: int | None, *, owner: str) -> None:
    """Refuse a number of states that is none.

    Raises:
        UserError: It is below 1.
    """
    if last is not None and last < 1:
        raise UserError(
            f"{owner} with last={last}",
            why="it is the number of states that are merged, the newest included; 1 = only the newest",
            fix="give a number from 1, or null for the states of all stages so far",
        )
