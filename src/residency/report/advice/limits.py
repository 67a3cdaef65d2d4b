"""What the evidence does not allow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from residency.metrics.statistics import order_sensitivity
from residency.report.advice.case import Case, listed
from residency.report.evidence.decision import LEAST_SEEDS
from residency.report.evidence.effects import ORDER
from residency.report.evidence.wording import figure
from residency.report.records.arms import Arm
from residency.report.records.records import Records
from residency.runs.views.tables import finite, printable

__all__ = ["limits"]


def limits(case: Case) -> Iterator[str]:
    """Sentences in order of weight."""
    records, trained, ranked = case.records, list(case.arms), case.ranked
    done = [arm for arm in trained if arm.done]
    if damaged := case.findings.study.rows.told():
        yield damaged
    if done:
        yield from _seeds(case, min(len(arm.done) for arm in done))
        yield from _tokenizers(case)
    yield from _orders(case, done)
    if not any(arm.done[0].record.get("probes") for arm in done):
        yield "No probe was scored: what happened to abilities outside these domains is not known."
    kinds = {entry.reference for entry in records.done}
    if not kinds & {"joint", "independent"} and done:
        yield "Neither joint nor single-domain training was run: how good it could get at best is not known."
    other = _other_winner(case)
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


def _seeds(case: Case, seeds: int) -> Iterator[str]:
    if seeds == 1:
        yield (
            "One seed: no statement about significance. Intervals show the noise of the test rows only; "
            "another seed may shift every number."
        )
    elif seeds < LEAST_SEEDS:
        yield f"{seeds} seeds: no test can rest on their spread. {LEAST_SEEDS} are the least, 6 for an exact test."
    else:
        family = max((e.family for e in case.findings.evidence), default=0)
        exact = "; fewer than 6 cannot reach .05 without assuming a normal distribution" if seeds < 6 else ""
        yield f"{seeds} seeds; p-values are corrected for all {family} comparisons of this page (Holm){exact}."
    bases = {e.found.basis for e in case.findings.evidence}
    if "seeds" in bases:
        yield "Scores of single test rows are not at hand for all comparisons: those speak for these test rows only."


def _tokenizers(case: Case) -> Iterator[str]:
    """The same text in more tokens has fewer nats per token: such a ranking is refused."""
    if not case.findings.study.same_tokens(case.records.scorer):
        yield (
            "The same rows have different numbers of tokens: the tokenizers differ, and "
            f"{printable(case.records.scorer)} per token ranks nobody. Compare by bits_per_byte, or by a score of "
            "answers (--scorer)."
        )


def _orders(case: Case, done: Sequence[Arm]) -> Iterator[str]:
    orders = {tuple(entry.record["domains"]) for arm in done for entry in arm.done}
    if len(orders) == 1 and len(next(iter(orders))) > 1:
        yield "One order of domains: another order may rank the methods differently."
    if ORDER in case.findings.study.varied:
        own = [arm for arm in done if arm.value == case.best]
        by_order: dict[str, list[float]] = {}
        for arm in own:
            by_order.setdefault(dict(arm.place).get(ORDER, ""), []).extend(arm.utility("average").values())
        spread = order_sensitivity(list(by_order.values()))
        if not math.isnan(spread):
            name = case.name(case.best)
            yield f"Order sensitivity of {name}: the score at the end has sd {figure(spread)} over orders."


def _warnings(records: Records, done: Sequence[Arm], ranked: Sequence[str]) -> Iterator[str]:
    """What the record of the best one says must be read beside its scores."""
    for arm in done:
        if ranked and arm.value == ranked[0]:
            texts = (arm.done[0].record.get("warnings") or {}).get(records.scorer) or []
            yield from (f"{printable(arm.name)}: {printable(text, 300)}" for text in texts)


def _gaps(record: Mapping[str, Any], scorer: str) -> bool:
    matrix = record["scores"][scorer]["R"]
    return any(finite(value) is None for row in matrix for value in row)


def _other_winner(case: Case) -> str:
    """Whether another scorer would put somebody else in front."""
    said = []
    for scorer in case.findings.tasks:
        found = {v: case.findings.level(v, "average", scorer) for v in case.ranked}
        known = {v: level for v, level in found.items() if level is not None}
        best = max(known, key=lambda v: known[v], default=None)
        if best is not None and len(known) > 1 and known[best] > known.get(case.ranked[0], known[best]):
            said.append(f"by {printable(scorer)} {printable(best)} is ahead")
    return f"Scores disagree: {'; '.join(said)}." if said else ""
