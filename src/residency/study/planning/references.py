"""What the cells of a study are compared with: runs that need no mitigation and are the same for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from residency.core.errors import UserError
from residency.study.planning.cells import Cell, Combination, combinations, make_cell
from residency.study.planning.study_file import Study

__all__ = ["plan_references"]

_MITIGATIONS = "model.mitigations"
_SHOTS = 4  # examples in the prompt of the prompted base, where the config gives none
Resolve = Callable[[Cell], Mapping[str, Any]]


def plan_references(study: Study, resolve: Resolve, examples: Callable[[Cell], int]) -> list[Cell]:
    """The reference cells of a study, for every combination of the axes that are not mitigations, and every seed.

    Args:
        study: As `load_study` gives it.
        resolve: Gives the full config of a cell.
        examples: Tells on how many examples a cell trains, over all its steps.
    """
    found: list[Cell] = []
    kinds = [*study.references, *(["per_domain"] if study.per_domain else [])]
    for combination in _without_mitigations(study) if kinds else []:
        for seed in study.seeds:
            plain = _cell(study, combination, "plain", seed)
            config = dict(resolve(plain))
            if "joint" in kinds and _has_own(config):
                config["examples"] = examples(plain)
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


def _prompted(study: Study, combination: Combination, seed: int, config: Mapping[str, Any]) -> list[Cell]:
    shots = config["data"].get("shots") or _SHOTS
    return [_cell(study, combination, "prompted", seed, {"frozen": True, "data.shots": shots})]


def _independent(study: Study, combination: Combination, seed: int, config: Mapping[str, Any]) -> list[Cell]:
    names = _order(config)
    return [_cell(study, combination, "independent", seed, {"data.order": [name]}, part=name) for name in names]


def _joint(study: Study, combination: Combination, seed: int, config: Mapping[str, Any]) -> list[Cell]:
    names, data = _order(config), config["data"]
    parts = {name: data["domains"][name] for name in names}
    joint = {"class_path": "residency.domains.joint.Joint", "init_args": {"domains": parts}}
    keys = {
        "data.domains": {"joint": joint},
        "data.probes": {**{name: _only_scored(part) for name, part in parts.items()}, **(data.get("probes") or {})},
        "data.order": ["joint"],
        **_as_much_as_all(config, len(names)),
        **({"stages": {}} if config.get("stages") else {}),
    }
    return [_cell(study, combination, "joint", seed, keys)]


def _only_scored(domain: Mapping[str, Any]) -> Mapping[str, Any]:
    """A domain as a probe, which makes no training rows."""
    arguments = domain.get("init_args") or {}
    return {**domain, "init_args": {**arguments, "augment": None}} if arguments.get("augment") else domain


def _as_much_as_all(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The budget of a whole stream for one stage; epochs over all rows are that already."""
    if "examples" in config:
        return {"trainer.max_steps": max(1, round(config["examples"] / config["data"]["batch_size"]))}
    if config.get("stage_tokens"):
        return {"stage_tokens": config["stage_tokens"] * count}
    steps = config["trainer"].get("max_steps")
    return {"trainer.max_steps": steps * count} if steps and steps > 0 else {}


def _has_own(config: Mapping[str, Any]) -> bool:
    """Whether stages have settings of their own that one stage on all rows can follow: their length.

    Raises:
        UserError: Their objectives differ.
    """
    own = {name: config["stages"][name] for name in _order(config) if (config.get("stages") or {}).get(name)}
    objectives = [name for name, settings in own.items() if settings.get("objective")]
    if objectives:
        raise UserError(
            f"references: joint, and stages.{objectives[0]}.objective",
            why="the joint reference trains on the rows of all domains at once, by one objective",
            fix="leave joint out of references",
        )
    return bool(own)


def _per_domain(study: Study, combination: Combination, seed: int, config: Mapping[str, Any]) -> list[Cell]:
    return [_cell(study, combination, "per_domain", seed, {"model.adapter": study.per_domain})]


def _order(config: Mapping[str, Any]) -> Sequence[str]:
    return config["data"].get("order") or list(config["data"]["domains"])


_MAKERS: Mapping[str, Callable[..., list[Cell]]] = {
    "frozen": _frozen,
    "prompted": _prompted,
    "independent": _independent,
    "joint": _joint,
    "per_domain": _per_domain,
}
