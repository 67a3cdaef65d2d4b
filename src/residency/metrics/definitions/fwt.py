"""zero-shot: see `fwt`."""

from __future__ import annotations

from residency.metrics.definitions.base import About, Scores, mean, utility

__all__ = ["ABOUT", "fwt"]

ABOUT = About(
    kind="gain",
    title="zero-shot",
    help="FWT: what a domain gains before it is learnt, from the ones before it",
    rank=50,
)


def fwt(R: Scores, *, higher_is_better: bool) -> float:
    """FWT = mean_{j≥2} (u[j-1, j] - u[0, j]), zero-shot transfer (GEM, there over a random model). NaN for T = 1."""
    u = utility(R, higher_is_better=higher_is_better)
    return mean(u[1:-1].diagonal(offset=1) - u[0, 1:])
