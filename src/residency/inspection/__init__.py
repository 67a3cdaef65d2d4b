"""What changed inside the model: observers that are switched on in the config and cost nothing while they are off.

`--inspection.weights configs/inspection/weights.yaml`, or in a config `inspection: {weights: {class_path: ...}}`.
Their findings are in every stage's record (stage.json, `inside`) and, without per-layer details, in results.json.
"""

from residency.inspection.base import Observer, StageSnapshot
from residency.inspection.gradients import GradientNorms
from residency.inspection.inspection import Inspection
from residency.inspection.lm_eval import LmEval
from residency.inspection.outputs import AnswerCalibration, KLToBase
from residency.inspection.representations import RepresentationDrift
from residency.inspection.weights import BackboneDrift, WeightDriftByLayer

__all__ = [
    "AnswerCalibration",
    "BackboneDrift",
    "GradientNorms",
    "Inspection",
    "KLToBase",
    "LmEval",
    "Observer",
    "RepresentationDrift",
    "StageSnapshot",
    "WeightDriftByLayer",
]
