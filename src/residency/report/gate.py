"""Limits on the scores of a run or a study, judged by the same evidence as the report. Exit code 4 for a script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from residency.core.errors import UserError
from residency.core.text import printable
from residency.metrics.crossed import Crossed, crossed
from residency.metrics.discovery import printed_sign
from residency.report.evidence.samples import METRICS, RowScores, Sample, columns_with, combined, sample_of
from residency.report.records.records import Entry

__all__ = ["Judged", "Limit", "judge", "parse_limit"]

State = Literal["ok", "within noise", "crossed", "not measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One limit.

    Args:
        kind: Whether the value may be at most or at least `bound`.
        scorer: `None` = the one that the study or run is about.
        metric: Of the score matrix, in the direction that tables print.
        bound: In the unit of the scores.
    """

    kind: Literal["max", "min"]
    scorer: str | None
    metric: str
    bound: float

    def __str__(self) -> str:
        name = self.metric if self.scorer is None else f"{self.scorer}/{self.metric}"
        return f"{name} {'<=' if self.kind == 'max' else '>='} {self.bound:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A limit and what a method scores.

    Args:
        limit: What was asked.
        method: Who was judged.
        against: Baseline, if the value is a paired difference to it.
        value: Mean over seeds, in the direction that tables print; `None` if there is none.
        noise: Half-width of the 95 % interval of the value; NaN if nothing is known about it.
        basis: What the interval speaks for.
        state: `crossed` = beyond the limit by more than the noise; `within noise` = beyond it, by less.
    """

    limit: Limit
    method: str
    against: str | None
    value: float | None
    noise: float
    basis: str
    state: State

    def line(self) -> str:
        """One line for a console."""
        mark = {"ok": "ok     ", "within noise": "noise  ", "crossed": "CROSSED", "not measured": "missing"}[self.state]
        if self.value is None:
            return f"{mark}  {self.limit}  {self.method}: no run has this score"
        noise = "noise not known" if math.isnan(self.noise) else f"± {self.noise:.4g} over {self.basis}"
        difference = f" more than {self.against}" if self.against else ""
        return (
            f"{mark}  {self.limit}  {self.method}: {self.value:{'+' if self.against else ''}.4g}{difference} ({noise})"
        )

    def as_json(self) -> dict[str, Any]:
        """The same for a program."""
        return {
            "limit": str(self.limit),
            "kind": self.limit.kind,
            "scorer": self.limit.scorer,
            "metric": self.limit.metric,
            "bound": self.limit.bound,
            "method": self.method,
            "against": self.against,
            "value": self.value,
            "noise": None if math.isnan(self.noise) else self.noise,
            "basis": self.basis,
            "state": self.state,
        }


def parse_limit(text: str, kind: Literal["max", "min"], *, scorers: Sequence[str], metrics: Sequence[str]) -> Limit:
    """`forgetting=0.1`, `json_valid=0.95` (its average at the end) or `json_valid/forgetting=0.1`.

    Raises:
        UserError: There is no such metric or scorer, or no number.
    """
    name, _, number = text.partition("=")
    try:
        bound = float(number)
    except ValueError:
        bound = math.nan
    scorer, _, metric = name.rpartition("/")
    if not scorer and name in scorers:
        scorer, metric = name, "average"
    if not math.isfinite(bound) or metric not in metrics or (scorer and scorer not in scorers):
        raise UserError(
            f"--{kind} {printable(text)}",
            why=f"a limit is METRIC=NUMBER, SCORER=NUMBER or SCORER/METRIC=NUMBER; the scorers here are "
            f"{', '.join(map(printable, scorers)) or 'none'}",
            fix=f"metrics are {', '.join(metrics)}; for example --max forgetting=0.1",
        )
    return Limit(kind=kind, scorer=scorer or None, metric=metric, bound=bound)


def judge(
    limit: Limit,
    *,
    method: str,
    runs: Sequence[Entry],
    scorer: str,
    baseline: Sequence[Entry] = (),
    against: str | None = None,
    rows: RowScores | None = None,
) -> Judged:
    """Judge the runs of one method.

    Args:
        limit: What is asked.
        method: Its name.
        runs: Its finished runs, one per seed.
        scorer: Where the limit names none.
        baseline: Runs to take the paired difference to: of the same seed, else its only one.
        against: Name of the baseline.
        rows: Reader of single rows.
    """
    scorer, rows = limit.scorer or scorer, rows or RowScores()
    columns = columns_with([*runs, *baseline], scorer)
    by_seed = {str(entry.record.get("seed")): entry for entry in baseline}
    only = baseline[0] if len(baseline) == 1 else None
    samples = []
    for entry in runs:
        own = _sample(entry, scorer, limit.metric, columns, rows)
        other = by_seed.get(str(entry.record.get("seed")), only)
        base = _sample(other, scorer, limit.metric, columns, rows) if other is not None else None
        if own is not None and (not baseline or base is not None):
            samples.append(own if base is None else combined({1.0: [own], -1.0: [base]}))
    if not samples:
        return _judged(limit, method, against, None)
    parts = [s.parts for s in samples if s.parts is not None]
    sign = _sign(runs[0], scorer, limit.metric)
    found = crossed([s.value for s in samples], parts if len(parts) == len(samples) else None)
    return _judged(limit, method, against, found, sign=sign)


def _judged(limit: Limit, method: str, against: str | None, found: Crossed | None, *, sign: float = 1.0) -> Judged:
    value = None if found is None else sign * found.estimate
    noise = math.nan if found is None else (found.high - found.low) / 2
    state: State = "not measured"
    if value is not None:
        over = value - limit.bound if limit.kind == "max" else limit.bound - value
        reach = 0.0 if math.isnan(noise) else noise
        state = "ok" if over <= 0 else "within noise" if over <= reach else "crossed"
    basis = "nothing" if found is None else found.basis
    return Judged(limit=limit, method=method, against=against, value=value, noise=noise, basis=basis, state=state)


def _sample(entry: Entry, scorer: str, metric: str, columns: Sequence[str], rows: RowScores) -> Sample | None:
    """With its rows where the metric is linear in them, else the number of the record."""
    if metric in METRICS:
        return sample_of(entry, scorer, metric, columns, rows)
    summary: Mapping[str, Any] = (entry.record.get("summary") or {}).get(scorer) or {}
    value = summary.get(metric)
    return None if value is None else Sample(float(value), None)


def _sign(entry: Entry, scorer: str, metric: str) -> float:
    """From a utility to what tables print: a loss reads as a loss, forgetting above 0 is bad."""
    # A sample is a utility; forgetting is one in samples only, not in the record's summary.
    return -1.0 if metric == "forgetting" else printed_sign(metric, higher_is_better=_higher(entry, scorer))


def _higher(entry: Entry, scorer: str) -> bool:
    return bool(entry.record["scores"][scorer]["higher_is_better"])
