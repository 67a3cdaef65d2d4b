"""BWT: see `bwt`."""

from __future__ import annotations

from residency.metrics.definitions.base import About, Scores, learned, mean, until

__all__ = ["ABOUT", "bwt"]

ABOUT = About(kind="gain", title="BWT", help="score at the end minus score when just learnt; below 0 is bad", rank=30)


def bwt(R: Scores, *, higher_is_better: bool, after: int | None = None) -> float:
    """BWT = mean_{j<k} (u[k, j] - u[j, j]), k = `after` or T; negative = forgot (GEM). NaN for k = 1.

    >>> bwt([[0, 0], [8, 1], [6, 9]], higher_is_better=True)
    -2.0
    """
    u, k = until(R, higher_is_better, after)
    return mean(u[k, : k - 1] - learned(u)[: k - 1])
