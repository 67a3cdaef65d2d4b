"""When a BWT or a forgetting must not be praised: nothing was learnt, so nothing could be forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence

from residency.metrics.matrix import Scores, bwt, learned, plasticity, utility

__all__ = ["learning_gain", "plasticity_warnings"]

_ALONE = 0.95


def learning_gain(R: Scores, *, higher_is_better: bool) -> list[float]:
    """(T,) u[j, j] - u[j-1, j]: what training on each domain itself added to it; NaN where a cell is missing.

    >>> learning_gain([[2.0, 0], [8, 1], [6, 9]], higher_is_better=True)
    [6.0, 8.0]
    """
    u = utility(R, higher_is_better=higher_is_better)
    return [float(gain) for gain in learned(u) - u[:-1].diagonal()]


def plasticity_warnings(
    R: Scores, names: Sequence[str], *, higher_is_better: bool, single: Scores | None = None
) -> list[str]:
    """What has to be printed beside BWT and forgetting so that they are not misread; empty if there is nothing.

    * A domain's own training did not improve it: its low forgetting means nothing.
    * BWT is positive and more than half of what the domains' own training gave: they were under-trained, and later
      training made up for it (the +30 % "BWT" of PEFT's OSF example).
    * Less than 95 % of what training on each domain alone reaches: stability was paid for with plasticity.

    Args:
        R: (T+1, T) scores.
        names: Of the T domains.
        higher_is_better: Direction.
        single: (T,) scores of models trained on one domain alone, if there are any.
    """
    gains = learning_gain(R, higher_is_better=higher_is_better)
    if len(names) != len(gains):
        raise ValueError(f"{len(names)} names for {len(gains)} domains of R. Give one name per domain.")
    found = []
    idle = [name for name, gain in zip(names, gains, strict=True) if gain <= 0]
    if idle:
        found.append(f"training on {', '.join(idle)} did not improve it: low forgetting there means nothing")
    backward, gain = bwt(R, higher_is_better=higher_is_better), math.fsum(gains) / len(gains)
    if backward > 0 and backward > gain / 2:
        found.append(
            f"BWT {backward:+.4g} is more than half of what the domains' own training gave ({gain:+.4g}): "
            "they were probably under-trained, not protected"
        )
    if single is not None:
        share = plasticity(R, higher_is_better=higher_is_better, single=single)
        if share < _ALONE:
            found.append(f"learnt only {100 * share:.0f} % of what training on each domain alone reaches")
    return found
