"""Stability of training, from the gradient norms of its steps (E19). Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["GradientStability", "gradient_stability", "stability_improvement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientStability:
    """How even the steps of one training were.

    Args:
        cv: Standard deviation / mean; 0 = all equal.
        mad_over_median: Median absolute deviation / median: the same without outliers.
        largest: The largest norm.
        spikes: Number of norms more than 4 standard deviations above the mean.
        steps: Number of norms.
        clipper: What clipped the gradients, for example `norm 1.0`, `value 0.5` or `none`. Clipping changes the
            trajectory, and with it all later norms.
        seed: Of the run.
    """

    cv: float
    mad_over_median: float
    largest: float
    spikes: int
    steps: int
    clipper: str
    seed: int


def gradient_stability(norms: npt.ArrayLike, *, clipper: str, seed: int) -> GradientStability:
    """CV, MAD/median, maximum and number of spikes (z > 4) of the norms; NaN where a norm is missing or all are 0.

    Args:
        norms: (n,) global gradient norms before clipping, one per optimizer step.
        clipper: What clipped them afterwards.
        seed: Of the run.

    >>> gradient_stability([2.0, 2.0, 2.0], clipper="none", seed=0).cv
    0.0
    """
    x = np.asarray(norms, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"norms have shape {x.shape}: give one per optimizer step")
    mean, sd, median = float(x.mean()), float(x.std()), float(np.median(x))
    mad = float(np.median(np.abs(x - median)))
    return GradientStability(
        cv=sd / mean if mean else math.nan,
        mad_over_median=mad / median if median else math.nan,
        largest=float(x.max()),
        spikes=int((x > mean + 4 * sd).sum()) if sd > 1e-12 * mean else 0,
        steps=x.size,
        clipper=clipper,
        seed=seed,
    )


def stability_improvement(method: GradientStability, base: GradientStability) -> float:
    """1 - CV_method/CV_base: above 0 = steadier than the base. Not 1 - max/max, which one spike of the base decides.

    Raises:
        ValueError: Clipper, seed or number of steps differ, so the two trainings cannot be compared.
    """
    for name in ("clipper", "seed", "steps"):
        ours, theirs = getattr(method, name), getattr(base, name)
        if ours != theirs:
            raise ValueError(
                f"{name} {ours!r} against {theirs!r}: gradient norms depend on it, so their stability cannot be "
                "compared. Run both with the same one."
            )
    return 1.0 - method.cv / base.cv if base.cv else math.nan
