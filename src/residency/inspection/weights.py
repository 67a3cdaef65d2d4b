"""How far the weights have moved, layer by layer (E17), and the backbone under the adapter (E16 b)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from residency.core.types import Tensors
from residency.inspection.base import Observer, StageSnapshot
from residency.inspection.drift_metrics import (
    WeightDrift,
    dense_drift,
    low_rank_drift,
    low_rank_inner,
    parametric_drift,
    spectral_norm,
)

__all__ = ["BackboneDrift", "WeightDriftByLayer"]

Factors = tuple[Tensor, Tensor]
_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class _Update:
    """A change of one weight, as a product or as a whole."""

    factors: Factors | None = None
    dense: Tensor | None = None

    def drift(self) -> WeightDrift:
        if self.dense is not None:
            return dense_drift(self.dense)
        assert self.factors is not None
        return low_rank_drift(*self.factors)

    def inner(self, other: _Update) -> float:
        if self.dense is not None and other.dense is not None:
            return float((self.dense.double() * other.dense.double()).sum())
        assert self.factors is not None and other.factors is not None  # noqa: PT018
        return low_rank_inner(self.factors, other.factors)


class WeightDriftByLayer(Observer):
    """E17: the update of every adapted weight since before training, relative to the pretrained weight.

    Records `norm` (‖ΔW‖_F over all layers), `frobenius` (‖ΔW‖_F/‖W_0‖_F), `spectral` (the largest ‖ΔW‖₂/‖W_0‖₂ of a
    layer), `stable_rank` (mean over layers), `cosine` (of this stage's own update with that of the stage before; null
    for the first), `by_block` (`frobenius` per transformer block), and in stage.json `layers` with all of it per layer.

    Updates of LoRA's form are never formed; what else such an adapter trains (biases, DoRA's magnitudes) is not in it.
    Where no update is a product, the adapter's own parameters are compared with their initial values; what is relative
    is null where those are 0.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, tuple[float, float]] = {}

    def after(self, snapshot: StageSnapshot) -> Mapping[str, Any]:
        """Drift of the state after stage k; nothing before training."""
        if snapshot.k == 0:
            return {}
        known: dict[int, Mapping[str, _Update]] = {}

        def state(k: int) -> Mapping[str, _Update]:
            if k not in known:
                known[k] = _updates(snapshot, k)
            return known[k]

        start = state(0)
        total = _minus(state(snapshot.k), start)
        step = _minus(state(snapshot.k), state(snapshot.k - 1))
        last = _minus(state(snapshot.k - 1), state(snapshot.k - 2)) if snapshot.k > 1 else {}
        self._measure(snapshot, start)
        layers = {name: self._layer(name, update, step, last) for name, update in total.items()}
        return _summary(layers, self._sizes, step, last) | {"layers": layers}

    def _measure(self, snapshot: StageSnapshot, start: Mapping[str, _Update]) -> None:
        """(‖W_0‖_F, ‖W_0‖₂) of every weight, once."""
        for name, update in start.items():
            if name not in self._sizes:
                adapter, model = snapshot.module.adapter, snapshot.module.model
                whole = update.dense if update.dense is not None else adapter.adapted_weight(model, name)
                spectral = spectral_norm(whole) if whole.dim() == 2 else float(whole.double().norm())
                self._sizes[name] = float(whole.double().norm()), spectral

    def _layer(
        self, name: str, update: _Update, step: Mapping[str, _Update], last: Mapping[str, _Update]
    ) -> dict[str, float]:
        drift, (frobenius, spectral) = update.drift(), self._sizes[name]
        return {
            "norm": drift.frobenius,
            "frobenius": drift.frobenius / frobenius if frobenius else math.nan,
            "spectral": drift.spectral / spectral if spectral else math.nan,
            "stable_rank": drift.stable_rank,
            "cosine": _cosine({name: step[name]}, last),
        }


class BackboneDrift(Observer):
    """E16 (b): 100 ‖θ_T - θ_0‖_F/‖θ_0‖_F over the pretrained parameters, against a freshly loaded copy.

    Records `percent`: exactly 0 while the backbone is frozen, whatever the adapter does; `unmatched`: how many
    parameters have no counterpart any more (a tuner replaced them), which makes `percent` null. Quantised weights are
    compared bit for bit.
    """

    def after(self, snapshot: StageSnapshot) -> Mapping[str, Any]:
        """Drift of the state after stage k; nothing before training."""
        if snapshot.k == 0:
            return {}
        live = {plain: p for name, p in snapshot.module.model.named_parameters() for plain in _plain(name)}
        moved = size = 0.0
        unmatched = 0
        for name, before in snapshot.module.backbone.load().named_parameters():
            now = live.get(name)
            if now is None or now.shape != before.shape:
                unmatched += 1
            elif before.is_floating_point():
                change, square = parametric_drift(now.cpu(), before.cpu())
                moved, size = moved + change, size + square
            elif not torch.equal(now.cpu(), before.cpu()):
                unmatched += 1
        percent = 100.0 * math.sqrt(moved / size) if size and not unmatched else math.nan
        return {"percent": percent, "unmatched": unmatched}


def _plain(name: str) -> tuple[str, str]:
    """The name a parameter had before PEFT wrapped the model, as tuners do it and as virtual tokens do it."""
    name = name.replace(".base_layer.", ".")
    return name.removeprefix("base_model.model."), name.removeprefix("base_model.")


def _updates(snapshot: StageSnapshot, k: int) -> Mapping[str, _Update]:
    """The adapter's contribution to every weight after stage k; of what is no product, the parameters themselves."""
    module = snapshot.module
    if k == snapshot.k:
        state: Tensors = module.adapter.state(module.model)
    elif k > 0:
        state = snapshot.states(k)
    elif "reference" in module.adapter.provides and (pairs := _pairs(snapshot)):
        # With the adapter off the model is the pretrained one, so before training there is no update.
        return {name: _Update(factors=(left[:, :0], right[:0])) for name, (left, right) in pairs.items()}
    else:
        state = module.adapter.state(snapshot.pristine())
    pairs = module.adapter.low_rank(module.model, state)
    if pairs:
        return {name: _Update(factors=pair) for name, pair in pairs.items()}
    return {name: _Update(dense=tensor.detach()) for name, tensor in state.items() if tensor.is_floating_point()}


def _pairs(snapshot: StageSnapshot) -> Mapping[str, Factors]:
    adapter, model = snapshot.module.adapter, snapshot.module.model
    return adapter.low_rank(model, adapter.state(model))


def _minus(now: Mapping[str, _Update], before: Mapping[str, _Update]) -> dict[str, _Update]:
    """Updates from one state to another; a difference of products is a product of the sum of the ranks."""
    found = {}
    for name, new in now.items():
        old = before.get(name)
        if old is None:
            found[name] = new
        elif new.dense is not None and old.dense is not None:
            found[name] = _Update(dense=new.dense.double() - old.dense.to(new.dense.device).double())
        else:
            assert new.factors is not None and old.factors is not None  # noqa: PT018
            (left, right), (old_left, old_right) = new.factors, old.factors
            old_left, old_right = old_left.to(left), old_right.to(right)
            found[name] = _Update(factors=(torch.cat([left, -old_left], 1), torch.cat([right, old_right], 0)))
    return found


def _cosine(a: Mapping[str, _Update], b: Mapping[str, _Update]) -> float:
    """Cosine of two sets of updates as one long vector each, over the layers that both have."""
    shared = [name for name in a if name in b]
    inner = sum(a[name].inner(b[name]) for name in shared)
    size = math.sqrt(max(0.0, sum(a[n].inner(a[n]) for n in shared) * sum(b[n].inner(b[n]) for n in shared)))
    return inner / size if size > 0 else math.nan


def _summary(
    layers: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, tuple[float, float]],
    step: Mapping[str, _Update],
    last: Mapping[str, _Update],
) -> dict[str, Any]:
    blocks: dict[int, list[str]] = {}
    for name in layers:
        if match := _BLOCK.search(name):
            blocks.setdefault(int(match[1]), []).append(name)
    ranks = [layer["stable_rank"] for layer in layers.values() if not math.isnan(layer["stable_rank"])]
    return {
        "norm": math.sqrt(sum(layer["norm"] ** 2 for layer in layers.values())),
        "frobenius": _relative(list(layers), layers, sizes),
        "spectral": max((layer["spectral"] for layer in layers.values()), default=math.nan),
        "stable_rank": sum(ranks) / len(ranks) if ranks else math.nan,
        "cosine": _cosine(step, last),
        "by_block": [_relative(blocks[block], layers, sizes) for block in sorted(blocks)],
    }


def _relative(
    names: list[str], layers: Mapping[str, Mapping[str, float]], sizes: Mapping[str, tuple[float, float]]
) -> float:
    """√(Σ ‖ΔW‖²/Σ ‖W_0‖²) over some layers."""
    known = [name for name in names if sizes[name][0]]
    moved = sum(layers[name]["norm"] ** 2 for name in known)
    size = sum(sizes[name][0] ** 2 for name in known)
    return math.sqrt(moved / size) if size else math.nan
