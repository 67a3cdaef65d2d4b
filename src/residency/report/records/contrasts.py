"""Arms against their baseline: paired over seeds, and over the examples below them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import polars as pl

from residency.metrics.bootstrap import bootstrap_interval
from residency.metrics.comparison import Comparison, compare_family
from residency.metrics.matrix import utility
from residency.metrics.statistics import FloatArray, Interval
from residency.report.records.arms import Arm, Place
from residency.report.records.records import Entry

__all__ = ["METRICS", "Contrast", "contrasts", "example_interval", "overall", "paired_examples", "shared_values"]

METRICS = ("average", "learning", "forgetting")
# Resampling is bounded: so many draws of examples for all contrasts together.
_DRAWS, _REPLICATES = 400_000_000, 4000

Parts = list[list[FloatArray]]


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One arm (or one value of the compared axis) against the baseline in one metric; positive is better.

    Args:
        name: Of the arm.
        value: Of the compared axis.
        context: The other axes.
        metric: average, learning or forgetting.
        seeds: Over seeds: difference, interval, exact p, verdict.
        examples: Hierarchical bootstrap of the difference, seeds then examples; `None` where they are not at hand.
    """

    name: str
    value: str
    context: Place
    metric: str
    seeds: Comparison
    examples: Interval | None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval to judge by: over seeds where there are two, else over examples."""
        if self.seeds.n > 1:
            return self.seeds.interval.low, self.seeds.interval.high
        return (self.examples.low, self.examples.high) if self.examples else None

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval is on one side."""
        return self.bounds is not None and self.bounds[0] * self.bounds[1] > 0


def contrasts(arms: Sequence[Arm], baseline: str, *, resampled: int = 40) -> list[Contrast]:
    """Every arm against the baseline in the same setting, with Holm's correction inside a setting.

    Args:
        arms: As `arms_of` gives them; references are left out.
        baseline: Value of the compared axis.
        resampled: For how many arms examples are resampled at most (time grows with their number).
    """
    found: list[Contrast] = []
    trained = [arm for arm in arms if arm.done]
    for context in dict.fromkeys(arm.context for arm in trained):
        here = [arm for arm in trained if arm.context == context]
        base = next((arm for arm in here if arm.value == baseline), None)
        if base is None or len(here) < 2:
            continue
        for metric in METRICS:
            values = {arm.value: arm.utility(metric) for arm in here}
            rest = {arm.value: arm for arm in here if arm is not base}
            for comparison in _families(values, baseline, metric):
                arm = rest[comparison.a]
                boot = _resampled(arm, base, metric) if len(found) < 3 * resampled else None
                found.append(
                    Contrast(
                        name=arm.name, value=arm.value, context=context, metric=metric, seeds=comparison, examples=boot
                    )
                )
    return found


def _families(values: dict[str, dict[Any, float]], baseline: str, metric: str) -> Iterable[Comparison]:
    """Paired comparisons; arms that share the same seeds with the baseline are one family."""
    families: dict[tuple[Any, ...], list[str]] = {}
    for name, own in values.items():
        shared = tuple(seed for seed in values[baseline] if seed in own)
        if name != baseline and shared:
            families.setdefault(shared, []).append(name)
    for shared, names in families.items():
        table = {name: [values[name][seed] for seed in shared] for name in (baseline, *names)}
        # Metrics are utilities except forgetting, of which less is better.
        yield from compare_family(table, baseline=baseline, higher_is_better=metric != "forgetting")


def overall(arms: Sequence[Arm], baseline: str, metric: str = "average") -> list[Comparison]:
    """Values of the compared axis against the baseline over all settings they share: one number per seed.

    A seed's number is its mean over the settings that every compared value has finished with that seed, so that no
    value is judged by easier settings than another. Values that share no setting with the baseline are left out.
    """
    table = shared_values(arms, metric)
    if baseline not in table or len(table) < 2:
        return []
    return compare_family(table, baseline=baseline, higher_is_better=metric != "forgetting")


def shared_values(arms: Sequence[Arm], metric: str) -> dict[str, list[float]]:
    """Value of the compared axis -> one utility per seed, over the settings that all of them have."""
    blocks: dict[str, dict[tuple[Place, Any], float]] = {}
    for arm in arms:
        own = {(arm.context, seed): v for seed, v in arm.utility(metric).items()}
        blocks.setdefault(arm.value, {}).update(own)
    blocks = {value: own for value, own in blocks.items() if own}
    # A value that has done less than half of what most have would shrink everybody's evidence: it is left out.
    most = max((len(own) for own in blocks.values()), default=0)
    blocks = {value: own for value, own in blocks.items() if 2 * len(own) >= most}
    shared = set.intersection(*({*own} for own in blocks.values())) if blocks else set()
    seeds = sorted({seed for _, seed in shared}, key=str)
    if not seeds:
        return {}
    return {v: [fmean(own[b] for b in shared if b[1] == seed) for seed in seeds] for v, own in blocks.items()}


# -- examples ---------------------------------------------------------------------------------------------------------


def example_interval(arm: Arm, metric: str) -> Interval | None:
    """Hierarchical bootstrap of an arm's metric, as a utility; `None` where examples are missing."""
    return _interval([_linear(entry, arm.scorer, metric) for entry in arm.done])


def _resampled(arm: Arm, base: Arm, metric: str) -> Interval | None:
    """Hierarchical bootstrap of the paired difference; positive is better."""
    pairs = [(arm.by_seed[seed], base.by_seed[seed]) for seed in base.by_seed if seed in arm.by_seed]
    # Contributions are utilities except those of forgetting, of which less is better.
    sign = -1 if metric == "forgetting" else 1
    found = [_difference(one, other, arm.scorer, metric, sign) for one, other in pairs]
    return _interval(found)


def paired_examples(one: Sequence[Arm], other: Sequence[Arm], metric: str) -> Interval | None:
    """Hierarchical bootstrap of one value of the compared axis against another, in the first setting they share."""
    for a in one:
        for b in other:
            if a.context == b.context:
                return _resampled(a, b, metric)
    return None


def _difference(one: Entry, other: Entry, scorer: str, metric: str, sign: int) -> tuple[Parts, Parts] | None:
    a, b = _linear(one, scorer, metric), _linear(other, scorer, metric)
    if a is None or b is None or [x.size for x in a[0][0]] != [x.size for x in b[0][0]]:
        return None
    return [[sign * (x - y) for x, y in zip(a[0][0], b[0][0], strict=True)]], a[1]


def _interval(seeds: Sequence[tuple[Parts, Parts] | None]) -> Interval | None:
    if not seeds or any(part is None for part in seeds):
        return None
    known = [part for part in seeds if part is not None]
    scores, weights = [s[0] for s, _ in known], [w[0] for _, w in known]
    size = sum(x.size for parts in scores for x in parts)
    if size == 0 or not all(parts for parts in scores):
        return None
    replicates = max(500, min(_REPLICATES, _DRAWS // (40 * size)))
    equal = all(bool((w == 1).all()) for parts in weights for w in parts)
    return bootstrap_interval(scores, weights=None if equal else weights, replicates=replicates)


def _linear(entry: Entry, scorer: str, metric: str) -> tuple[Parts, Parts] | None:
    """Per-example contributions whose weighted mean over rows, then over domains, is the metric (as a utility).

    Forgetting is linear once it is fixed after which stage each domain was at its best.
    """
    record = entry.record
    matrix, domains = record["scores"][scorer]["R"], list(record["domains"])
    higher = bool(record["scores"][scorer]["higher_is_better"])
    count = len(domains)
    try:
        u = utility([row[:count] for row in matrix], higher_is_better=higher)
    except ValueError:
        return None
    tables: dict[int, dict[str, tuple[FloatArray, FloatArray]] | None] = {}

    def at(stage: int, domain: str) -> tuple[FloatArray, FloatArray] | None:
        if stage not in tables:
            tables[stage] = _by_domain(entry.examples(stage), scorer)
        table = tables[stage]
        return None if table is None else table.get(domain)

    values: list[FloatArray] = []
    weights: list[FloatArray] = []
    for j, domain in enumerate(domains if metric in ("average", "learning") else domains[:-1]):
        best = j + 1
        if metric == "forgetting" and not np.isnan(u[j + 1 : count, j]).any():
            best = j + 1 + int(np.argmax(u[j + 1 : count, j]))
        last, first = at(count if metric != "learning" else j + 1, domain), at(best, domain)
        if last is None or first is None or last[0].size != first[0].size:
            return None
        own = last[0] if metric in ("average", "learning") else first[0] - last[0]
        values.append(own if higher else -own)
        weights.append(last[1])
    return [values], [weights]


def _by_domain(frame: pl.DataFrame | None, scorer: str) -> dict[str, tuple[FloatArray, FloatArray]] | None:
    """column -> (values, weights) in the order of the rows' names, so that two tables are paired."""
    if frame is None or not {"column", "row", "scorer", "value", "tokens"} <= {*frame.columns}:
        return None
    found = {}
    for (column,), part in frame.filter(pl.col("scorer") == scorer).sort("row").group_by("column"):
        values = part["value"].to_numpy().astype(np.float64)
        # As in the column's mean (residency.engine.scoring.evaluation.means); older files have no weights.
        by = "weight" if "weight" in part.columns else "tokens" if scorer == "nll" else None
        weights = part[by].to_numpy().astype(np.float64) if by else np.ones(len(part))
        if not np.isfinite(values).all() or math.isclose(weights.sum(), 0):
            return None
        found[str(column)] = (values, weights)
    return found
