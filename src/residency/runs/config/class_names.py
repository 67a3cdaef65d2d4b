"""Classes that can be given by their short names: jsonargparse knows those that are imported."""

from __future__ import annotations

from residency import adapters, backbones, domains, inspection, mitigations, objectives
from residency.domains import packaged

__all__ = ["class_names"]

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
