"""What the cells of a study are compared with: runs that need no mitigation and are the same for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from residency.study.planning.cells import Cell, Combination, combinations, make_cell
from residency.study.planning.study_file import Study

__all__ = ["plan_references"]

_MITIGATIONS = "model.mitigations"
Resolve = Callable[[Cell], Mapping[str, Any]]


def plan_references(study: Study, resolve: Resolve) -> list[Cell]:
    """The reference cells of a study, for every combination of the axes that are not mitigations, and every seed.

    Args:
        study: As `load_study` gives it.
        resolve: Gives the full config of a cell.
    """
    found: list[Cell] = []
    kinds = [*study.references, *(["per_domain"] if study.per_domain else [])]
    for combination in _without_mitigations(study) if kinds else []:
        for seed in study.seeds:
            plain = _cell(study, combination, "plain", seed)
            config = resolve(plain)
            for kind in kinds:
                found += _MAKERS[kind](study, combination, seed, config)
    return found


def _without_mitigations(study: Study) -> list[Combination]:
    kept: dict[str, Combination] = {}
    mitigating = {
        axis
        for axis, values in study.axes.items()
        if all(k.startswith(_MITIGATIONS) for v in values.values() for k in v)
    }
    for combination in combinations(study):
        keys = [{k: v for k, v in part.items() if not k.startswith(_MITIGATIONS)} for part in combination.keys]
        axes = {axis: value for axis, value in combination.axes.items() if axis not in mitigating}
        reduced = Combination(axes=axes, keys=(*keys, {_MITIGATIONS: None}))
        kept.setdefault(json.dumps(keys), reduced)
    return list(kept.values())


def _cell(
    study: Study,
    combination: Combination,
    kind: str,
    seed: int,
    keys: Mapping[str, Any] | None = None,
    *,
    part: str | None = None,
) -> Cell:
    axes = {"reference": kind if part is None else f"{kind} {part}", **combination.axes}
    return make_cell(study, axes, combination.keys, seed, reference=kind, last=keys or {})


def _frozen(study: Study, combination: Combination, seed: int, config: Mapping[str, Any]) -> list[Cell]:
    return [_cell(study, combination, "frozen", seed, {"frozen": True})]


def _independent(study: Study, combination: Combination, seed: int, config: Mapping[str, Any]) -> list[Cell]:
    names = _order(config)
    return [_cell(study, combination, "independent", seed, {"data.order": [name]}, part=name) for name in names]


def _joint(study: Study, combination: Combination, seed: int, config: Mapping[str, Any]) -> list[Cell]:
    names, data = _order(config), config["data"]
    parts = {name: data["domains"][name] for name in names}
    joint = {"class_path": "residency.domains.joint.Joint", "init_args": {"domains": parts}}
    keys = {
        "data.domains": {"joint": joint},
        "data.probes": {**parts, **(data.get("probes") or {})},
        "data.order": ["joint"],
        **_as_much_as_all(config, len(names)),
    }
    return [_cell(study, combination, "joint", seed, keys)]


def _as_much_as_all(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The budget of a whole stream for one stage; epochs over all rows are that already."""
    if config.get("stage_tokens"):
        return {"stage_tokens": config["stage_tokens"] * count}
    steps = config["trainer"].get("max_steps")
    return {"trainer.max_steps": steps * count} if steps and steps > 0 else {}


def _per_domain(study: Study, combination: Combination, seed: int, config: Mapping[str, Any]) -> list[Cell]:
    return [_cell(study, combination, "per_domain", seed, {"model.adapter": study.per_domain})]


def _order(config: Mapping[str, Any]) -> Sequence[str]:
    return config["data"].get("order") or list(config["data"]["domains"])


_MAKERS: Mapping[str, Callable[..., list[Cell]]] = {
    "frozen": _frozen,
    "independent": _independent,
    "joint": _joint,
    "per_domain": _per_domain,
}
