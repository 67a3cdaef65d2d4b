"""Folds over the mitigations: of gradients before a step, of parameters after it, of weights after a stage."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from residency.core.tensors import snapshot
from residency.core.types import Batch, Outputs, Stage, Tensors
from residency.mitigations.base import HOOKS, Mitigation, overrides, serves
from residency.mitigations.contract import StageModule

__all__ = [
    "active_hooks",
    "added_terms",
    "before_adapter",
    "frozen_inputs",
    "load_states",
    "metrics_to_log",
    "mixed_weights",
    "prepare_dataset",
    "write_gradients",
    "write_update",
]


def active_hooks(mitigations: Collection[Mitigation]) -> dict[str, list[Mitigation]]:
    """Hook -> the mitigations that override it, in the order in which they are folded.

    Gradients and updates are folded by kind, so that the order of the config does not decide which of two
    guarantees holds; everything else in the order of the config.
    """
    active = {hook: [m for m in mitigations if overrides(m, hook)] for hook in HOOKS}
    active["transform_weights"] = [m for m in active["transform_weights"] if m.into == "train"]
    active["served_weights"] = [m for m in mitigations if serves(m)]
    active["transform_gradients"].sort(key=lambda m: m.gradient_order)
    active["transform_update"].sort(key=lambda m: m.update_order)
    return active


def prepare_dataset(
    module: StageModule, mitigations: Iterable[Mitigation], stage: Stage, *, stored: Container[str]
) -> None:
    """Fold the training set of a module's stage through the mitigations.

    Those that rewrite rows come before those that put others in their place, whose shares then add.

    Args:
        module: Its `dataset` is the stage's own, and is replaced.
        mitigations: In the order of the config.
        stage: Which one.
        stored: Mitigations whose preparation of this stage will be loaded, by name.
    """
    for mitigation in sorted(mitigations, key=lambda m: m.rehearsal() is not None):
        if overrides(mitigation, "prepare_dataset") and mitigation.name not in stored:
            mitigation.prepare_dataset(module, module.dataset, stage)
        module.dataset = mitigation.transform_dataset(module.dataset, stage)


def load_states(mitigations: Mapping[str, Mitigation], stored: Mapping[str, Any]) -> None:
    """Bring back what mitigations have made of a stage that goes on, by name."""
    for name, state in stored.items():
        mitigations[name].load_state_dict(dict(state))


def added_terms(
    module: StageModule, mitigations: Iterable[Mitigation], batch: Batch, outputs: Outputs
) -> dict[str, Tensor]:
    """`<part>/<term>` -> what adapter and mitigations add to the loss."""
    terms = {f"adapter/{name}": v for name, v in module.adapter.loss_terms(module.model, module.stage).items()}
    for mitigation in mitigations:
        for term, value in mitigation.loss_terms(module, batch, outputs).items():
            terms[f"{mitigation.name}/{term}"] = value
    return terms


def frozen_inputs(module: StageModule, mitigations: Iterable[Mitigation]) -> dict[str, list[Tensor]]:
    """Input directions that mitigations keep out of the updates of a matrix, by the path of its owner."""
    found: dict[str, list[Tensor]] = {}
    for mitigation in mitigations:
        for owner, directions in mitigation.frozen_inputs(module).items():
            found.setdefault(owner, []).append(directions)
    return found


def metrics_to_log(module: StageModule, mitigations: Iterable[Mitigation]) -> dict[str, float]:
    """`<part>/<name>` -> what adapter and mitigations say about a logged step."""
    parts = [("adapter", module.adapter.metrics_to_log(module.model, module.stage))]
    parts += [(mitigation.name, mitigation.metrics_to_log(module)) for mitigation in mitigations]
    return {f"{part}/{name}": float(value) for part, found in parts for name, value in found.items()}


def write_gradients(module: StageModule, mitigations: Sequence[Mitigation]) -> None:
    """Replace the gradients of all leaves by what the mitigations make of them, in order."""
    leaves = module.adapter.trainable(module.model)
    gradients: Tensors = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for mitigation in mitigations:
        gradients = mitigation.transform_gradients(module, gradients)
    for name, gradient in gradients.items():
        leaves[name].grad = gradient


@torch.no_grad()
def write_update(module: StageModule, mitigations: Sequence[Mitigation], before: Tensors, *, adapts: bool) -> None:
    """Replace the parameters after an optimizer step by what the adapter, then the mitigations make of them.

    Args:
        module: As the optimizer left it.
        mitigations: Those that override `transform_update`, in order.
        before: The leaves before the step.
        adapts: Whether the adapter overrides `transform_update`.
    """
    leaves = module.adapter.trainable(module.model)
    final: Tensors = {name: leaf.detach() for name, leaf in leaves.items()}
    if adapts:
        final = module.adapter.transform_update(module.model, before, final)
    for mitigation in mitigations:
        final = mitigation.transform_update(module, before, final)
    for name, tensor in final.items():
        if tensor.data_ptr() != leaves[name].data_ptr():
            leaves[name].copy_(tensor)


def mixed_weights(
    module: StageModule,
    mitigations: Sequence[Mitigation],
    before: dict[str, Tensor],
    base: dict[str, Tensor],
    *,
    hook: Literal["transform_weights", "served_weights"] = "transform_weights",
) -> dict[str, float]:
    """Replace the weights of a trained stage by what the mitigations make of them.

    Args:
        module: As the last step left it.
        mitigations: Those that take part, in order.
        before: The adapter's state as the stage found it, on the module's device.
        base: The adapter's state before the first stage; empty if nobody asks for it.
        hook: Which of their hooks.

    Returns:
        What the adapter reports of taking the weights over (the error of a refactorisation).
    """
    adapter, model = module.adapter, module.model
    old = adapter.weights(model, before)
    after = module.trained_weights = adapter.weights(model, snapshot(adapter.state(model)))
    module.base_weights = adapter.weights(model, base) if base else {}
    final = after
    for mitigation in mitigations:
        final = getattr(mitigation, hook)(module, old, final)
    log: dict[str, float] = {}
    if final is old or final is module.base_weights:
        adapter.load_state(model, before if final is old else base)
    elif final is not after:
        log = dict(adapter.load_weights(model, final))
    module.base_weights, module.trained_weights = {}, {}
    return log


def before_adapter(
    module: StageModule, mitigations: Iterable[Mitigation], stage: Stage, *, stored: Container[str]
) -> None:
    """The hook of the same name, where the state of a stage is not stored already."""
    for mitigation in mitigations:
        if mitigation.name not in stored:
            mitigation.before_adapter(module, stage)
