"""The table of the first screen: every score of whom the page is about, beside the baseline and the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from residency.core.text import printable
from residency.metrics.discovery import printed_sign
from residency.report.advice.case import Case
from residency.report.evidence.decision import Evidence
from residency.report.evidence.wording import over
from residency.runs.views.tables import finite, majority

__all__ = ["first_screen"]


def first_screen(case: Case) -> list[dict[str, Any]]:
    """One row per scorer, then what became of general ability.

    Columns: score, domains (those that have the scorer), before (base model), baseline, leader, better by, low, high,
    interval, p, evidence. Scores in the direction that tables print; `better by` above 0 is good.
    """
    if not case.means["average"]:
        return []
    return [*(_score(case, s) for s in (case.records.scorer, *case.findings.tasks)), *_probes(case), *_benchmarks(case)]


def _score(case: Case, scorer: str) -> dict[str, Any]:
    found, higher = case.evidence("average", scorer), case.higher(scorer)
    before = case.findings.mean_before(scorer)
    sign = printed_sign("average", higher_is_better=higher)
    columns = found.claim.columns if found is not None else ()
    return {
        "score": f"{printable(scorer)}, {'higher' if higher else 'lower'} is better",
        "domains": ", ".join(map(printable, columns)) + _majority(case, scorer, columns),
        "before": None if before is None else sign * before,
        "baseline": case.printed(case.base, "average", scorer),
        "leader": case.printed(case.best, "average", scorer),
        **_evidence(found),
    }


def _majority(case: Case, scorer: str, columns: Sequence[str]) -> str:
    """What the most frequent labels would score, averaged over the same domains."""
    record = next((e.record for arm in case.of(case.base) for e in arm.done), {})
    lines = [line for name in columns if (line := majority(record, scorer, name)) is not None]
    return f"; the most frequent labels would score {fmean(lines):.3f}" if lines and len(lines) == len(columns) else ""


def _probes(case: Case) -> list[dict[str, Any]]:
    """Change of the probes since before training."""
    scorer = case.records.scorer
    own = case.printed(case.best, "general", scorer)
    if own is None:
        return []
    probes = dict.fromkeys(p for arm in case.of(case.best) for e in arm.done for p in e.record.get("probes") or [])
    row: dict[str, Any] = {"score": f"general ability ({printable(scorer)}, + is better)"}
    row["domains"] = ", ".join(map(printable, probes))
    row |= {"before": 0.0, "baseline": case.printed(case.base, "general", scorer), "leader": own}
    return [row | _evidence(case.evidence("general", scorer))]


def _benchmarks(case: Case) -> list[dict[str, Any]]:
    """What lm-eval says since before training: the mean over benchmarks, a group counted once, and the worst one."""
    own, base = (_deltas(case, value) for value in (case.best, case.base))
    rows = []
    for name in own:
        worst = min(own[name], key=lambda benchmark: own[name][benchmark], default=None)
        ours, theirs = (fmean(found[name].values()) if found.get(name) else None for found in (own, base))
        row: dict[str, Any] = {"score": f"{printable(name)}, change (+ is better)"}
        row |= {"domains": f"{len(own[name])} benchmarks, mean", "before": 0.0, "baseline": theirs, "leader": ours}
        rows.append(row | _evidence(None))
        if worst is not None:
            row = {"score": f"{printable(name)}, worst change", "domains": printable(worst), "before": 0.0}
            row |= {"baseline": base.get(name, {}).get(worst), "leader": own[name][worst]}
            rows.append(row | _evidence(None))
    return rows


def _deltas(case: Case, value: str) -> dict[str, dict[str, float]]:
    """lm_eval/<metric> -> benchmark -> change, mean over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for arm in case.of(value):
        for entry in arm.done:
            general: Mapping[str, Any] = entry.record.get("general") or {}
            for name, ability in general.items():
                if name.startswith("lm_eval/"):
                    for benchmark, delta in (ability.get("deltas") or {}).items():
                        if (number := finite(delta)) is not None:
                            found.setdefault(name, {}).setdefault(benchmark, []).append(number)
    return {name: {b: fmean(deltas) for b, deltas in own.items()} for name, own in found.items()}


def _evidence(found: Evidence | None) -> dict[str, Any]:
    if found is None:
        return dict.fromkeys(("better by", "low", "high", "interval", "p", "evidence"))
    ends = {"low": finite(found.found.low), "high": finite(found.found.high), "interval": over(found)}
    return {"better by": finite(found.estimate), **ends, "p": finite(found.p), "evidence": found.word}
