"""What became of benchmarks and of calibration since before training, as the observers of the runs have found it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from residency.core.text import printable
from residency.report.records.arms import Arm
from residency.runs.views.tables import finite

__all__ = ["Change", "benchmark_rows", "calibration", "changes", "mean_change"]

_PREFIX = "lm_eval/"


@dataclass(frozen=True, slots=True)
class Change:
    """A difference to before training, mean over seeds; above 0 is good.

    Args:
        value: The difference.
        error: Its standard error over the benchmark's rows, `None` where a run has none. All seeds answer the same
            rows, so that more of them do not make it smaller.
    """

    value: float
    error: float | None


def changes(arms: Sequence[Arm]) -> dict[str, dict[str, Change]]:
    """`lm_eval/<metric>` -> benchmark -> change, over all finished runs of some arms; a group is one benchmark."""
    found: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for metric, benchmark, value, error in _measured(arms):
        found.setdefault(metric, {}).setdefault(benchmark, []).append((value, error))
    return {metric: {b: _over_seeds(runs) for b, runs in own.items()} for metric, own in found.items()}


def _measured(arms: Sequence[Arm]) -> Iterator[tuple[str, str, float, float | None]]:
    for arm in arms:
        for entry in arm.done:
            general: Mapping[str, Any] = entry.record.get("general") or {}
            for metric, ability in general.items():
                errors = ability.get("stderr") or {}
                for benchmark, delta in (ability.get("deltas") or {}).items() if metric.startswith(_PREFIX) else ():
                    if (number := finite(delta)) is not None:
                        yield metric, benchmark, number, finite(errors.get(benchmark))


def _over_seeds(runs: Sequence[tuple[float, float | None]]) -> Change:
    errors = [error for _, error in runs if error is not None]
    return Change(fmean(value for value, _ in runs), fmean(errors) if len(errors) == len(runs) else None)


def mean_change(own: Mapping[str, Change]) -> Change:
    """Over benchmarks, whose rows are independent: √Σe² / n."""
    errors = [change.error for change in own.values() if change.error is not None]
    error = math.sqrt(sum(e**2 for e in errors)) / len(own) if len(errors) == len(own) else None
    return Change(fmean(change.value for change in own.values()), error)


def benchmark_rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """One row per arm, metric and benchmark: method, metric, benchmark, change, standard error, seeds."""
    return [
        {"method": arm.name, "metric": metric.removeprefix(_PREFIX), "benchmark": printable(benchmark)}
        | {"change": change.value, "standard error": change.error, "seeds": len(arm.done)}
        for arm in arms
        for metric, own in changes([arm]).items()
        for benchmark, change in own.items()
    ]


def calibration(arms: Sequence[Arm]) -> tuple[float, float, tuple[str, ...]] | None:
    """Expected calibration error before training and at the end, mean over domains and seeds, and those domains.

    `None` where no run, or not every finished run, was looked at by `AnswerCalibration`.
    """
    ends: list[tuple[float, float]] = []
    domains: tuple[str, ...] = ()
    runs = [entry.record for arm in arms for entry in arm.done]
    for record in runs:
        first, last = (_errors(record, row) for row in (0, -1))
        domains = tuple(name for name in record["domains"] if name in first and name in last)
        if domains:
            ends.append((fmean(first[d] for d in domains), fmean(last[d] for d in domains)))
    if not ends or len(ends) < len(runs):
        return None
    before, after = zip(*ends, strict=True)
    return fmean(before), fmean(after), domains


def _errors(record: Mapping[str, Any], row: int) -> dict[str, float]:
    """Column -> expected calibration error after one row of the score matrix."""
    inside: Sequence[Mapping[str, Any]] = record.get("inside") or []
    found: dict[str, float] = {}
    for findings in inside[row].values() if inside else ():
        columns = findings.get("columns") if isinstance(findings, Mapping) else None
        for name, column in (columns or {}).items():
            if isinstance(column, Mapping) and (error := finite(column.get("ece"))) is not None:
                found[name] = error
    return found
