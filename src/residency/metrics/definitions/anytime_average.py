"""anytime: see `anytime_average`."""

from __future__ import annotations

import numpy as np

from residency.metrics.definitions.base import About, Scores, mean, utility

__all__ = ["ABOUT", "anytime_average"]

ABOUT = About(
    kind="level", title="anytime", help="AIA: average over the domains learnt so far, averaged over stages", rank=60
)


def anytime_average(R: Scores, *, higher_is_better: bool) -> float:
    """AIA = (1/T) Σ_k ACC_k, the average incremental accuracy (Rebuffi et al. 2017, iCaRL)."""
    u = utility(R, higher_is_better=higher_is_better)
    return mean(np.array([mean(u[k, :k]) for k in range(1, len(u))]))
