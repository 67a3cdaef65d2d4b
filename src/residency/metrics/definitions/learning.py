"""just learnt: see `learning`."""

from __future__ import annotations

from residency.metrics.definitions.base import About, Scores, learned, mean, utility

__all__ = ["ABOUT", "learning"]

ABOUT = About(kind="level", title="just learnt", help="LA: each domain right after its own stage, averaged", rank=20)


def learning(R: Scores, *, higher_is_better: bool) -> float:
    """LA = (1/T) Σ_j u[j, j], learning accuracy (Riemer et al. 2019). Belongs beside every `bwt`."""
    return mean(learned(utility(R, higher_is_better=higher_is_better)))
