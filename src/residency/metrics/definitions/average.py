"""score at the end: see `average`."""

from __future__ import annotations

from residency.metrics.definitions.base import About, Scores, mean, until

__all__ = ["ABOUT", "average"]

ABOUT = About(
    kind="level", title="score at the end", help="ACC: average over all domains after the last stage", rank=10
)


def average(R: Scores, *, higher_is_better: bool, after: int | None = None) -> float:
    """ACC_k = (1/k) Σ_{j≤k} u[k, j], k = `after` or T (Lopez-Paz and Ranzato 2017, GEM).

    >>> average([[0, 0], [8, 1], [6, 9]], higher_is_better=True)
    7.5
    """
    u, k = until(R, higher_is_better, after)
    return mean(u[k, :k])
