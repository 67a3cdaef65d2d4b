"""Two methods compared over seeds, and what may be said about it in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from residency.metrics.statistics import (
    Interval,
    effect_size,
    holm,
    paired_t,
    probability_of_improvement,
    sign_flip,
    t_interval,
)

__all__ = ["Comparison", "Outcome", "compare", "compare_family", "seeds_needed", "verdict"]

Outcome = Literal["better", "worse", "undecided", "insufficient", "equal", "missing"]
"""What the seeds show about a against b: a is better or worse; the test could have shown it and did not; it could not
have shown it with so few seeds; all seeds agree to the last bit; a value is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """a against b over the same seeds, oriented so that a positive difference means that a is better.

    Args:
        a: Name of the first method.
        b: Name of the second.
        n: Pairs (seeds) compared.
        differences: (n,) a - b in utility.
        difference: Their mean.
        interval: 95 % t-interval of the mean.
        p: Of the exact sign-flip test.
        smallest_p: The smallest p that the test can reach on these pairs.
        p_adjusted: Holm's p in the family that `compare_family` was given; else `p`.
        p_t: Of the paired t-test.
        p_normal: Of Shapiro and Wilk's test of the t-test's assumption.
        effect_size: d_z.
        improvement: P(a better than b), ties ½, over all pairs of seeds.
        noise_floor: What the evaluation set alone can hide, in the unit of the scores; NaN if not given.
        alpha: Level of the verdict.
        outcome: See `Outcome`.
    """

    a: str
    b: str
    n: int
    differences: tuple[float, ...]
    difference: float
    interval: Interval
    p: float
    smallest_p: float
    p_adjusted: float
    p_t: float
    p_normal: float
    effect_size: float
    improvement: float
    noise_floor: float
    alpha: float
    outcome: Outcome

    @property
    def verdict(self) -> str:
        """The outcome as a sentence."""
        return verdict(self)


def compare(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    higher_is_better: bool,
    names: tuple[str, str] = ("a", "b"),
    alpha: float = 0.05,
    noise_floor: float = math.nan,
) -> Comparison:
    """Compare two methods by one number per seed.

    Args:
        a: (n,) values of the first method, one per seed; order and data split are paired too.
        b: (n,) values of the second for the same seeds in the same order.
        higher_is_better: Direction of the values. Metrics of `residency.metrics.matrix` except the forgettings are
            utilities: True. `forgetting*` : False.
        names: How the verdict calls them.
        alpha: Level at which something counts as shown.
        noise_floor: Of the evaluation sets, see `residency.metrics.example_level.noise_floor`.

    Raises:
        ValueError: The values are not paired.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or x.size == 0:
        raise ValueError(f"{names[0]} has shape {x.shape}, {names[1]} {y.shape}: give one value per seed, paired")
    d = (x - y) if higher_is_better else (y - x)
    test = sign_flip(d)
    p_t, p_normal = paired_t(d)
    improvement = probability_of_improvement(*((x, y) if higher_is_better else (y, x)))
    found = Comparison(
        a=names[0],
        b=names[1],
        n=test.n,
        differences=tuple(float(value) for value in d),
        difference=float(d.mean()),
        interval=t_interval(d),
        p=test.p,
        smallest_p=test.smallest_p,
        p_adjusted=test.p,
        p_t=p_t,
        p_normal=p_normal,
        effect_size=effect_size(d),
        improvement=improvement,
        noise_floor=noise_floor,
        alpha=alpha,
        outcome="undecided",
    )
    return replace(found, outcome=_outcome(found, reachable_p=found.smallest_p))


def compare_family(
    values: Mapping[str, Sequence[float]],
    *,
    baseline: str,
    higher_is_better: bool,
    alpha: float = 0.05,
    noise_floor: float = math.nan,
) -> list[Comparison]:
    """Every method against one baseline, with p-values adjusted for their number (Holm).

    Args:
        values: Name -> one value per seed; all for the same seeds in the same order.
        baseline: One of the names.
        higher_is_better: Direction, see `compare`.
        alpha: Level for the whole family.
        noise_floor: Of the evaluation sets.
    """
    if baseline not in values:
        raise ValueError(f"baseline {baseline!r} is none of {sorted(values)}")
    options = {"higher_is_better": higher_is_better, "alpha": alpha, "noise_floor": noise_floor}
    others = [name for name in values if name != baseline]
    found = [compare(values[n], values[baseline], names=(n, baseline), **options) for n in others]  # type: ignore[arg-type]
    p_values = [c.p for c in found]
    judged = []
    for i, (c, p_adjusted) in enumerate(zip(found, holm(p_values), strict=True)):
        reachable = holm([*p_values[:i], c.smallest_p, *p_values[i + 1 :]])[i]
        c = replace(c, p_adjusted=p_adjusted)
        judged.append(replace(c, outcome=_outcome(c, reachable_p=reachable)))
    return judged


def seeds_needed(*, alpha: float = 0.05, family: int = 1) -> int:
    """The fewest seeds whose smallest p, times the number of comparisons, is under alpha.

    >>> seeds_needed(), seeds_needed(family=4)
    (6, 8)
    """
    return math.floor(1 - math.log2(alpha / family)) + 1


def _outcome(c: Comparison, *, reachable_p: float) -> Outcome:
    """`reachable_p`: what p_adjusted would be if these pairs had the smallest p that they can have."""
    if math.isnan(c.difference):
        return "missing"
    if not any(c.differences):
        return "equal"
    if c.p_adjusted < c.alpha:
        return "better" if c.difference > 0 else "worse"
    return "insufficient" if reachable_p >= c.alpha else "undecided"


def verdict(c: Comparison) -> str:
    """One sentence on what the seeds show, with the numbers it rests on.

    >>> print(verdict(compare([0.8, 0.9, 0.7], [0.5, 0.6, 0.5], higher_is_better=True, names=("EWC", "plain"))))
    EWC is ahead of plain by 0.2667 (95 % interval 0.1232 to 0.4101), but that is not evidence: n = 3 seeds cannot \
reach p < .05 (the smallest possible p is .25).
    """
    side = f"{c.a} is {'ahead of' if c.difference > 0 else 'behind'} {c.b} by {_number(abs(c.difference))}"
    if c.difference == 0:
        side = f"{c.a} and {c.b} are level on average"
    sign = 1 if c.difference > 0 else -1
    low, high = sorted((sign * c.interval.low, sign * c.interval.high))
    spread = f" (95 % interval {_number(low)} to {_number(high)})" if c.n > 1 else ""
    seeds = f"n = {c.n} seed{'s' * (c.n != 1)}"
    adjusted = " after correction for several comparisons" if c.p_adjusted != c.p else ""
    texts: dict[Outcome, str] = {
        "missing": f"{c.a} and {c.b} cannot be compared: a value is missing.",
        "equal": f"{c.a} and {c.b} are equal: the difference is 0 for every seed ({seeds}).",
        "insufficient": f"{side}{spread}, but that is not evidence: {_too_few(c, seeds)}.",
        "undecided": f"{side}{spread}, which {seeds} do not tell from chance (p = {_p(c.p_adjusted)}{adjusted}).",
    }
    shown = f"{c.a} is {'better' if c.difference > 0 else 'worse'} than {c.b} by {_number(abs(c.difference))}{spread}"
    sentence = texts.get(c.outcome, f"{shown}, p = {_p(c.p_adjusted)}{adjusted}, {seeds}.")
    if 0 < abs(c.difference) < c.noise_floor:
        sentence += f" It is below the noise floor of the evaluation sets (±{_number(c.noise_floor)})."
    return sentence


def _too_few(c: Comparison, seeds: str) -> str:
    if c.smallest_p >= c.alpha:
        return f"{seeds} cannot reach p < {_p(c.alpha)} (the smallest possible p is {_p(c.smallest_p)})"
    return (
        f"{seeds} cannot reach p < {_p(c.alpha)} in a family of this size "
        f"(the smallest possible p before correction is {_p(c.smallest_p)})"
    )


def _p(p: float) -> str:
    """.05, .03125 -> .031, as p-values are printed."""
    return f"{p:.2g}".removeprefix("0") if p < 1 else "1"


def _number(value: float) -> str:
    return f"{value:.4g}"
