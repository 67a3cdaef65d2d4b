"""retained: see `stability`."""

from __future__ import annotations

from residency.metrics.definitions.base import About, Scores, kept, learned, mean, utility

__all__ = ["ABOUT", "stability"]

ABOUT = About(
    kind="gain",
    title="retained",
    help="ST: share of what was learnt that is left at the end; 1 = nothing lost",
    rank=100,
)


def stability(R: Scores, *, higher_is_better: bool) -> float:
    """ST = mean_{j<T} u[T, j] / u[j, j], the retention ratio; 1 = nothing lost. Directions as in `plasticity`."""
    u = utility(R, higher_is_better=higher_is_better)
    return mean(kept(u[-1, :-1], learned(u)[:-1], higher_is_better))
