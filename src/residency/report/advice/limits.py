"""What the evidence does not allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from residency.metrics.comparison import seeds_needed
from residency.report.advice.case import listed
from residency.report.records.arms import Arm
from residency.report.records.contrasts import shared_values
from residency.report.records.records import Records
from residency.runs.views.tables import finite, printable

__all__ = ["limits"]


def limits(records: Records, trained: Sequence[Arm], ranked: Sequence[str]) -> Iterator[str]:
    done = [arm for arm in trained if arm.done]
    seeds = min((len(arm.done) for arm in done), default=0)
    if seeds:
        yield _seed_limit(seeds, max(1, len(ranked) - 1))
    orders = {tuple(entry.record["domains"]) for arm in done for entry in arm.done}
    if len(orders) == 1 and len(next(iter(orders))) > 1:
        yield "One order of domains: another order may rank the methods differently."
    if not any(arm.done and arm.done[0].record.get("probes") for arm in done):
        yield "No probe was scored: what happened to abilities outside these domains is not known."
    kinds = {entry.reference for entry in records.done}
    if not kinds & {"joint", "independent"} and done:
        yield "Neither joint nor single-domain training was run: how good it could get at best is not known."
    other = _other_winner(records, trained, ranked)
    if other:
        yield other
    told = [printable(arm.value) for arm in trained if arm.oracle]
    if told:
        yield f"Told the domain at test time, so it forgets little by construction: {listed(told)}."
    missing = [entry for entry in records.entries if not entry.done]
    if missing:
        names = listed([f"{printable(e.record['cell'])} ({printable(e.record['status'])})" for e in missing])
        yield f"{len(missing)} of {len(records.entries)} cells are not in these numbers: {names}."
    yield from _warnings(records, done, ranked)
    gaps = sorted({printable(arm.name) for arm in done for e in arm.done if _gaps(e.record, records.scorer)})
    if gaps:
        yield f"Scores are missing inside the matrices of {listed(gaps)}; numbers that need them are left out."


def _warnings(records: Records, done: Sequence[Arm], ranked: Sequence[str]) -> Iterator[str]:
    """What the record of the best one says must be read beside its scores."""
    for arm in done:
        if ranked and arm.value == ranked[0]:
            texts = (arm.done[0].record.get("warnings") or {}).get(records.scorer) or []
            yield from (f"{printable(arm.name)}: {printable(text, 300)}" for text in texts)


def _gaps(record: Mapping[str, Any], scorer: str) -> bool:
    matrix = record["scores"][scorer]["R"]
    return any(finite(value) is None for row in matrix for value in row)


def _seed_limit(seeds: int, family: int) -> str:
    needed = seeds_needed(family=family)
    if seeds == 1:
        return (
            "One seed: no statement about significance. Intervals show the noise of the test rows only; "
            f"another seed may shift every number. {needed} seeds could show a difference."
        )
    if seeds < needed:
        compared = f" in {family} comparisons" if family > 1 else ""
        return f"{seeds} seeds cannot reach p < .05{compared} without assuming a distribution; {needed} seeds could."
    return f"{seeds} seeds; p-values are corrected for {family} comparison{'s' * (family != 1)} (Holm)."


def _other_winner(records: Records, trained: Sequence[Arm], ranked: Sequence[str]) -> str:
    """Whether another scorer would choose differently."""
    names = {name for arm in trained for e in arm.done for name in e.record["scores"]} - {records.scorer}
    said = []
    for name in sorted(names):
        arms = [Arm(place=a.place, subject=a.subject, scorer=name, entries=a.entries) for a in trained]
        table = shared_values([arm for arm in arms if not arm.oracle], "average")
        if len(table) > 1 and ranked:
            best = max(table, key=lambda v: fmean(table[v]))
            if best != ranked[0]:
                said.append(f"by {printable(name)} {printable(best)} would be best")
    return f"Scores disagree: {'; '.join(said)}." if said else ""
