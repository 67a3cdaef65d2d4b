"""Metrics of a run: pure functions. `matrix` has the cited definitions, `variants` the others by name.

Imported by their own names, because scipy and torch take time to load: `statistics` and `example_level` (how far
numbers can be trusted), `cost`. A new metric of the matrix is one file in `definitions`.
"""

from residency.metrics.anytime import learning_curve_area, stability_gap
from residency.metrics.general import AbilityDeltas, ability_deltas
from residency.metrics.learning_check import learning_gain, plasticity_warnings
from residency.metrics.matrix import (
    anytime_average,
    average,
    bwt,
    forgetting,
    fwt,
    intransigence,
    learning,
    min_accuracy,
    missing_cells,
    perplexity_forgetting,
    plasticity,
    relative_forgetting,
    stability,
    stability_plasticity,
    summary,
    worst_case_accuracy,
)
from residency.metrics.variants import (
    average_triangle,
    bwt_over_T,
    bwt_triangle,
    bwt_triangle_skip_neighbour,
    forgetting_first_last,
    forgetting_max_all_previous,
    forgetting_max_including_last,
    forgetting_max_with_base,
    forgetting_skip_neighbour,
    fr_joint_normalised,
    fwt_diag_minus_constant,
    fwt_no_baseline,
    fwt_triangle,
    fwt_vs_single,
    remembering,
)

__all__ = [
    "AbilityDeltas",
    "ability_deltas",
    "anytime_average",
    "average",
    "average_triangle",
    "bwt",
    "bwt_over_T",
    "bwt_triangle",
    "bwt_triangle_skip_neighbour",
    "forgetting",
    "forgetting_first_last",
    "forgetting_max_all_previous",
    "forgetting_max_including_last",
    "forgetting_max_with_base",
    "forgetting_skip_neighbour",
    "fr_joint_normalised",
    "fwt",
    "fwt_diag_minus_constant",
    "fwt_no_baseline",
    "fwt_triangle",
    "fwt_vs_single",
    "intransigence",
    "learning",
    "learning_curve_area",
    "learning_gain",
    "min_accuracy",
    "missing_cells",
    "perplexity_forgetting",
    "plasticity",
    "plasticity_warnings",
    "relative_forgetting",
    "remembering",
    "stability",
    "stability_gap",
    "stability_plasticity",
    "summary",
    "worst_case_accuracy",
]
