"""General ability: what happened to benchmarks that no stage trained on (E13)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["AbilityDeltas", "ability_deltas"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AbilityDeltas:
    """Change of every benchmark since before training, in utility: below 0 = ability lost.

    Args:
        deltas: Per benchmark; NaN where a score is missing.
        mean: ΔR^G of TRACE, over all benchmarks; NaN if one is missing.
        minimum: The worst delta. The mean hides a collapse that other benchmarks make up for.
        worst: The benchmark of the minimum; `None` if there is none.
        missing: Benchmarks that lack a score before or after.
    """

    deltas: dict[str, float]
    mean: float
    minimum: float
    worst: str | None
    missing: list[str]


def ability_deltas(
    base: Mapping[str, float | None], after: Mapping[str, float | None], *, higher_is_better: bool
) -> AbilityDeltas:
    """ΔR^G_t = (1/M) Σ_i (R^G_{t,i} - R^G_{0,i}), each term, and the smallest term (Wang et al. 2023, TRACE).

    Args:
        base: Benchmark -> score before training.
        after: Benchmark -> score after a stage.
        higher_is_better: Direction of the scores; of losses the deltas are negated.

    >>> found = ability_deltas({"MMLU": 46.0, "GSM": 26.0}, {"MMLU": 48.0, "GSM": 3.0}, higher_is_better=True)
    >>> found.mean, found.minimum, found.worst
    (-10.5, -23.0, 'GSM')
    """
    sign = 1.0 if higher_is_better else -1.0
    names = [*base, *(name for name in after if name not in base)]
    before, now = ({n: _number(scores.get(n)) for n in names} for scores in (base, after))
    deltas = {name: sign * (now[name] - before[name]) for name in names}
    missing = [name for name, delta in deltas.items() if math.isnan(delta)]
    known = [name for name in names if name not in missing]
    complete = bool(names) and not missing
    worst = min(known, key=deltas.__getitem__, default=None)
    return AbilityDeltas(
        deltas=deltas,
        mean=sum(deltas.values()) / len(names) if complete else math.nan,
        minimum=deltas[worst] if complete and worst is not None else math.nan,
        worst=worst if complete else None,
        missing=missing,
    )


def _number(value: float | None) -> float:
    """An infinite score is no score."""
    return float(value) if value is not None and math.isfinite(value) else math.nan
