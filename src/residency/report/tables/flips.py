"""Answers that changed sides: a mean that moves little may hide many of both kinds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from residency.core.text import printable
from residency.metrics.crossed import Crossed, FloatArray
from residency.metrics.flips import flip_rates
from residency.report.evidence.findings import Findings
from residency.report.evidence.samples import RowScores, columns_with
from residency.report.evidence.wording import p_value
from residency.report.records.arms import Arm
from residency.report.records.records import Entry, Records
from residency.runs.views.tables import finite

__all__ = ["flips"]

_Answers = dict[str, FloatArray]
_END = -1


def flips(records: Records, arms: Sequence[Arm], findings: Findings) -> list[dict[str, Any]]:
    """One row per arm, score of right and wrong answers, and comparison.

    Compared are the end with what was right just after each domain was learnt (the last one left out), and the end
    with the baseline's end in the same setting and seed. Columns: method, from, score, domains, seeds, rows, right to
    wrong and wrong to right (shares, each with low and high, 95 % over seeds and rows), interval, p of McNemar by seed.
    """
    rows: RowScores = findings.study.rows
    base = [arm for arm in arms if arm.value == records.baseline]
    bases = {(arm.context, seed): entry for arm in base for seed, entry in arm.by_seed.items()}
    found = []
    for arm in arms:
        for scorer in (records.scorer, *findings.tasks):
            columns = columns_with(arm.done, scorer)
            learnt = [_pair(entry, _Side(entry, None), scorer, columns, rows) for entry in arm.done]
            found += _row(arm, "itself, just learnt", scorer, learnt)
            if arm.value != records.baseline:
                own = [(entry, bases.get((arm.context, seed))) for seed, entry in arm.by_seed.items()]
                against = [_pair(e, _Side(b, _END), scorer, columns, rows) for e, b in own if b is not None]
                found += _row(arm, printable(records.baseline), scorer, against)
    return found


class _Side:
    """Where the answers come from: `stage` `None` = for each domain right after it was learnt."""

    def __init__(self, entry: Entry, stage: int | None) -> None:
        self.entry = entry
        self.stage = stage

    def places(self, columns: Sequence[str]) -> Iterator[tuple[str, int]]:
        domains = list(self.entry.record["domains"])
        for column in columns:
            if self.stage is not None:
                yield column, len(domains)
            elif column in domains[:-1]:
                yield column, domains.index(column) + 1


def _pair(
    entry: Entry, before: _Side, scorer: str, columns: Sequence[str], rows: RowScores
) -> tuple[_Answers, _Answers] | None:
    """(before, at the end) of one seed; `None` unless all answers are at hand and right or wrong."""
    old: _Answers = {}
    new: _Answers = {}
    for column, stage in before.places(columns):
        first = rows.at(before.entry, stage, scorer, column)
        last = rows.at(entry, len(entry.record["domains"]), scorer, column)
        if first is None or last is None or first[0].shape != last[0].shape:
            return None
        if not np.isin(np.concatenate([first[0], last[0]]), (0.0, 1.0)).all():
            return None
        old[column], new[column] = first[0], last[0]
    return (old, new) if old else None


def _row(arm: Arm, start: str, scorer: str, pairs: Sequence[tuple[_Answers, _Answers] | None]) -> list[dict[str, Any]]:
    known = [pair for pair in pairs if pair is not None]
    if not known or len(known) < len(pairs):
        return []
    found = flip_rates(known)
    row: dict[str, Any] = {"method": arm.name, "from": start, "score": printable(scorer)}
    row |= {"domains": ", ".join(map(printable, known[0][0])), "seeds": len(known), "rows": found.lost.rows}
    row |= _rate("right to wrong", found.lost) | _rate("wrong to right", found.gained)
    return [{**row, "interval": found.lost.basis, "McNemar p by seed": ", ".join(map(p_value, found.p))}]


def _rate(name: str, rate: Crossed) -> dict[str, float | None]:
    """A share cannot be below 0 or above 1, whatever its interval's approximation says."""
    low, high = finite(rate.low), finite(rate.high)
    ends = {"low": None if low is None else max(0.0, low), "high": None if high is None else min(1.0, high)}
    return {name: rate.estimate, **{f"{name}, {end}": value for end, value in ends.items()}}
