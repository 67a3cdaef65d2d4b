"""The one decision: a claim in, its estimate, interval, corrected p and one word out.

A claim is a paired difference, one number per seed. Two-sided t-test with the crossed standard error (seeds and test
rows are both a sample, `crossed`), Holm's correction over **all** claims of a page, whichever seeds they rest on. The
exact sign-flip test stands beside it with the smallest p that it can reach: it needs no normal distribution, speaks for
these test rows only, and cannot reach .05 with fewer than 6 seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from residency.metrics.crossed import Crossed, Parts, crossed
from residency.metrics.statistics import effect_size, holm, sign_flip

__all__ = ["ALPHA", "LEAST_SEEDS", "Claim", "Evidence", "Word", "decide"]

ALPHA = 0.05
LEAST_SEEDS = 3  # two differences say nothing about their own spread that a test could rest on

Word = Literal["better", "worse", "open", "too few seeds", "one seed", "equal", "missing"]
"""better, worse: shown after correction · open: tested and not shown · too few seeds, one seed: not tested · equal: no
row differs under any seed · missing: nothing to compare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a page would like to say: a against b. Positive differences mean that a is better.

    Args:
        axis: Axis of a study; for an interaction two, joined by " × ".
        a: Value of the axis.
        b: Value it is compared with.
        metric: average, learning, forgetting, general.
        scorer: Of the scores.
        columns: Domains that the metric averages over.
        settings: Combinations of the other axes that both values were run in.
        scores: One paired difference per seed.
        parts: Per seed, what the rows contributed; `None` where they are not at hand.
        unit: What was repeated; `order` where there is one seed in several orders.
    """

    axis: str
    a: str
    b: str
    metric: str
    scorer: str
    columns: tuple[str, ...]
    settings: int
    scores: tuple[float, ...]
    parts: tuple[Parts, ...] | None
    unit: Literal["seed", "order"] = "seed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A claim with all that may be said about it.

    Args:
        claim: What was compared.
        found: Estimate, interval, p without correction, noise floor of the paired difference.
        p: Corrected for the family (Holm); NaN where nothing was tested.
        p_exact: Of the exact sign-flip test over seeds, without correction.
        smallest_p: The smallest p that the sign-flip test can reach with this many seeds.
        effect_size: d_z, mean over standard deviation of the differences.
        family: Number of tests on the page.
        alpha: Level of the page.
        word: The decision.
    """

    claim: Claim
    found: Crossed
    p: float
    p_exact: float
    smallest_p: float
    effect_size: float
    family: int
    alpha: float
    word: Word

    @property
    def estimate(self) -> float:
        """Mean difference; positive = a is better."""
        return self.found.estimate

    @property
    def shown(self) -> bool:
        """Whether a difference is shown."""
        return self.word in ("better", "worse")

    @property
    def above_noise(self) -> bool:
        """Whether the difference is more than the choice of test rows explains; `True` where rows are not known."""
        return not abs(self.estimate) <= self.found.noise_floor


def decide(claims: Sequence[Claim], *, alpha: float = ALPHA) -> list[Evidence]:
    """Judge all claims of a page together.

    Args:
        claims: Everything that the page compares; leaving one out makes the correction wrong.
        alpha: Probability of at least one wrong "better" or "worse" on the page if nothing differs.
    """
    found = [crossed(claim.scores, claim.parts) if claim.scores else _nothing() for claim in claims]
    tests = [one.p if one.seeds >= LEAST_SEEDS else math.nan for one in found]
    family = sum(not math.isnan(p) for p in tests)
    return [
        _evidence(claim, one, p, family=family, alpha=alpha)
        for claim, one, p in zip(claims, found, holm(tests) if tests else [], strict=True)
    ]


def _nothing() -> Crossed:
    return Crossed(
        estimate=math.nan,
        low=math.nan,
        high=math.nan,
        p=math.nan,
        df=math.nan,
        basis="none",
        seeds=0,
        rows=0,
        noise_floor=math.nan,
    )


def _evidence(claim: Claim, found: Crossed, p: float, *, family: int, alpha: float) -> Evidence:
    test = sign_flip(claim.scores)
    return Evidence(
        claim=claim,
        found=found,
        p=p,
        p_exact=test.p,
        smallest_p=test.smallest_p,
        effect_size=effect_size(claim.scores),
        family=family,
        alpha=alpha,
        word=_word(claim, found, p, alpha),
    )


def _word(claim: Claim, found: Crossed, p: float, alpha: float) -> Word:
    if math.isnan(found.estimate):
        return "missing"
    rows = [part for own in claim.parts or () for part in own.values()]
    if not any(claim.scores) and not any(np.any(part) for part in rows):
        return "equal"
    if found.seeds < LEAST_SEEDS:
        return "one seed" if found.seeds == 1 else "too few seeds"
    if p < alpha:
        return "better" if found.estimate > 0 else "worse"
    return "open"
