"""worst case: see `worst_case_accuracy`."""

from __future__ import annotations

from residency.metrics.definitions.base import About, Scores, until
from residency.metrics.definitions.min_accuracy import min_accuracy

__all__ = ["ABOUT", "worst_case_accuracy"]

ABOUT = About(
    kind="level",
    title="worst case",
    help="WC-ACC: the newest domain and the worst of the old ones, weighed by number",
    rank=90,
)


def worst_case_accuracy(R: Scores, *, higher_is_better: bool, after: int | None = None) -> float:
    """WC-ACC = u[k, k]/k + (1 - 1/k) · min-ACC, k = `after` or T (De Lange et al. 2023). u[1, 1] for k = 1."""
    u, k = until(R, higher_is_better, after)
    worst = min_accuracy(R, higher_is_better=higher_is_better, after=k) if k > 1 else 0.0
    return float(u[k, k - 1]) / k + (1 - 1 / k) * worst
