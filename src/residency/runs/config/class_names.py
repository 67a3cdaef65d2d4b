"""Classes that can be given by their short names: jsonargparse knows those that are imported."""

from __future__ import annotations

from residency import adapters, backbones, domains, inspection, mitigations, objectives
from residency.core.presets import component_kind, list_presets
from residency.domains import packaged

__all__ = ["class_names", "part_names"]

_PARTS: dict[str, type] = {
    "model.backbone": backbones.Backbone,
    "model.adapter": adapters.Adapter,
    "model.objective": objectives.Objective,
    "model.mitigations": mitigations.Mitigation,
    "data.domains": domains.Domain,
    "data.probes": domains.Domain,
    "inspection": inspection.Observer,
}


def class_names() -> dict[str, list[str]]:
    """Names of the classes of ours that can be built, by the start of the keys that take them."""
    modules = (backbones, adapters, objectives, mitigations, domains, packaged, inspection)
    classes = [vars(module)[name] for module in modules for name in module.__all__]
    return {
        key: [part.__name__ for part in classes if issubclass(part, base) and part is not base]
        for key, base in _PARTS.items()
    }


def part_names() -> dict[str, list[str]]:
    """What may be written for a key: names of classes and of presets, by the start of the keys that take them."""
    kinds = {key: component_kind(key) or component_kind(f"{key}.x") for key in _PARTS}
    presets = {key: [] if kind is None else [p.name for p in list_presets(kind)] for key, kind in kinds.items()}
    return {key: [*names, *presets[key]] for key, names in class_names().items()}
