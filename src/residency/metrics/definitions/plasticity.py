"""plasticity: see `plasticity`."""

from __future__ import annotations

from residency.metrics.definitions.base import About, Scores, kept, learned, mean, reference, utility

__all__ = ["ABOUT", "plasticity"]

ABOUT = About(
    kind="gain",
    title="plasticity",
    help="PL: score when just learnt over that of training on the domain alone",
    rank=120,
    needs="single",
)


def plasticity(R: Scores, *, higher_is_better: bool, single: Scores) -> float:
    """PL = (1/T) Σ_j u[j, j] / single_j, a ratio; 1 = learnt as well as alone.

    `single`: (T,) score of a model trained on domain j alone, direction as R; not above 0 gives NaN.
    For lower-is-better scores, which must be nats: mean of exp(single_j - R[j, j]).
    """
    u = utility(R, higher_is_better=higher_is_better)
    return mean(kept(learned(u), reference(single, "single", u, higher_is_better=higher_is_better), higher_is_better))
