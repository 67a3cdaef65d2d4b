"""What changed inside the model: observers that are switched on in the config and cost nothing while they are off.

`--inspection.weights configs/inspection/weights.yaml`, or in a config `inspection: {weights: {class_path: ...}}`.
Their findings are in every stage's record (stage.json, `inside`) and, without per-layer details, in results.json.
"""

from typing import Any

from residency.core.plug_ins import load_plug_ins
from residency.inspection.base import Observer, StageSnapshot
from residency.inspection.inspection import Inspection

__all__ = ["Inspection", "Observer", "StageSnapshot", *load_plug_ins(globals(), "Observer")]


def __getattr__(name: str) -> Any:
    # Never reached for a class that is there: it tells type checkers that names are found when the package is imported.
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
