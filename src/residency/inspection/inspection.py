"""All observers of a run, as the stream calls them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from residency.backbones.base import Backbone
from residency.core.errors import UserError
from residency.core.types import Stage, Tensors
from residency.inspection.base import Observer, StageSnapshot

if TYPE_CHECKING:
    from residency.domains.stream_data import StreamData
    from residency.engine.module import ContinualModule

__all__ = ["Inspection", "inside_record"]

# What only the stage's own record keeps: results.json stays small.
_DETAILS = ("layers", "curve")


class Inspection:
    """Looks inside the model before training and after every stage. Without observers every method returns at once.

    Args:
        observers: By name; the name is the key under which the findings are recorded.
    """

    def __init__(self, observers: Mapping[str, Observer] | None = None) -> None:
        self.observers = dict(observers or {})

    @property
    def looks_at_states(self) -> bool:
        """Whether somebody looks at a state after a stage; who only watches the steps needs no state brought back."""
        return any(type(observer).after is not Observer.after for observer in self.observers.values())

    def checked(self, backbone: Backbone) -> Inspection:
        """Itself, with every observer held against the backbone, before anything is loaded.

        Raises:
            UserError: One looks at decoders only.
        """
        for name, observer in self.observers.items():
            reasons = {"classifier": observer.not_on_classifiers, "encoder-decoder": observer.decoder_only}
            if why := reasons.get(backbone.family, ""):
                raise UserError(
                    f"inspection.{name} ({type(observer).__name__}) with model.backbone {type(backbone).__name__}, "
                    f"{backbone.family}",
                    why=why,
                    fix=f"leave inspection.{name} out; weights, kl and calibration work",
                )
        return self

    def callbacks(self, stage: Stage, data: StreamData) -> list[Callback]:
        """Observers for the Trainer of one stage."""
        return [callback for observer in self.observers.values() for callback in observer.callbacks(stage, data)]

    def during(self) -> dict[str, Any]:
        """Facts for the stage's record: {"inside": {observer: what its callbacks saw}}, or nothing."""
        return _facts({name: observer.during() for name, observer in self.observers.items()})

    @torch.no_grad()
    def after_stage(
        self,
        module: ContinualModule,
        data: StreamData,
        *,
        k: int,
        seed: int,
        states: Callable[[int], Tensors],
        facts: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Facts for the record of row k: {"inside": {observer: findings}}, or nothing if nobody looks.

        A function of the stored states alone: a run that was killed and goes on finds the same. Mode and random state
        are left as they were.

        Args:
            module: Built, in the state after stage k.
            data: Domains and probes.
            k: 0 = before training.
            seed: The run's seed.
            states: The adapter's stored state after an earlier stage.
            facts: The row's facts so far; what `during` has found stays in them.
        """
        if not self.observers:
            return {}
        snapshot = StageSnapshot(module=module, data=data, k=k, seed=seed, states=states)
        training = module.model.training
        module.model.eval()
        try:
            with torch.random.fork_rng(devices=[]):
                found = {name: observer.after(snapshot) for name, observer in self.observers.items()}
        finally:
            module.model.train(training)
        seen = facts.get("inside", {})
        return _facts({name: {**seen.get(name, {}), **found.get(name, {})} for name in {**seen, **found}})


def inside_record(stages: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The `inside` entry of results.json: what was found at each row, without the details that stage.json has.

    Args:
        stages: Records of row 0 and of every stage; their `inside` is {observer: findings}.

    Returns:
        One mapping per row; `[]` if nobody looked.
    """
    rows = [
        {name: {k: v for k, v in findings.items() if k not in _DETAILS} for name, findings in inside.items()}
        for inside in (stage.get("inside", {}) for stage in stages)
    ]
    return rows if any(rows) else []


def _facts(findings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    inside = {name: _json(found) for name, found in findings.items() if found}
    return {"inside": inside} if inside else {}


def _json(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, become null."""
    if isinstance(value, Mapping):
        return {str(key): _json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
