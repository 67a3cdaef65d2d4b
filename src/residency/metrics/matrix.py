"""What was learnt and what was forgotten: pure functions of one score matrix.

`R` has shape (T+1, T): `R[k, j-1]` is the score on the j-th domain after training on the k-th one, row 0 is
the model before any training, columns are in training order. A missing score is NaN (or `None`), never 0.

Every function computes on the **utility** u: u = R if higher is better, u = -R for a loss. So of losses
`average` is minus the mean, and for every scorer `bwt` below 0 and `forgetting` above 0 mean forgot.
Formulas number rows and domains from 1; u[0, j] is the base model. Results have the unit of the scores.

A result that reads a missing cell is NaN; `missing_cells` lists them. With T = 1 nothing can be forgotten
or transferred: NaN too. Other definitions of the same words are in `residency.metrics.variants`.
"""

from __future__ import annotations

import numpy as np

from residency.metrics.definitions.anytime_average import anytime_average
from residency.metrics.definitions.average import average
from residency.metrics.definitions.base import FloatArray, Scores, learned, mean, missing_cells, reference, utility
from residency.metrics.definitions.bwt import bwt
from residency.metrics.definitions.forgetting import forgetting
from residency.metrics.definitions.fwt import fwt
from residency.metrics.definitions.intransigence import intransigence
from residency.metrics.definitions.learning import learning
from residency.metrics.definitions.min_accuracy import min_accuracy
from residency.metrics.definitions.plasticity import plasticity
from residency.metrics.definitions.relative_forgetting import relative_forgetting
from residency.metrics.definitions.stability import stability
from residency.metrics.definitions.stability_plasticity import stability_plasticity
from residency.metrics.definitions.worst_case_accuracy import worst_case_accuracy
from residency.metrics.discovery import matrix_metrics

__all__ = [
    "FloatArray",
    "Scores",
    "anytime_average",
    "average",
    "bwt",
    "forgetting",
    "fwt",
    "intransigence",
    "learned",
    "learning",
    "mean",
    "min_accuracy",
    "missing_cells",
    "perplexity_forgetting",
    "plasticity",
    "reference",
    "relative_forgetting",
    "stability",
    "stability_plasticity",
    "summary",
    "utility",
    "worst_case_accuracy",
]


def perplexity_forgetting(R: Scores) -> FloatArray:
    """(T-1,) perplexity ratios exp(R[T, j] - R[j, j]) of an R in nats, per domain; above 1 = forgot."""
    nll = utility(R, higher_is_better=True)
    with np.errstate(over="ignore"):
        return np.exp(nll[-1, :-1] - learned(nll)[:-1])


def summary(R: Scores, *, higher_is_better: bool) -> dict[str, float]:
    """Every metric of one matrix that needs nothing else, by name, in the form of `results.json`."""
    found = (metric for metric in matrix_metrics().values() if metric.about.needs is None)
    return {metric.name: metric(R, higher_is_better=higher_is_better) for metric in found}
