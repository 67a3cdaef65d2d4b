"""The table of the first screen: every score of whom the page is about, beside the baseline and the base model."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from residency.core.text import printable
from residency.metrics.discovery import printed_sign
from residency.report.advice.case import Case
from residency.report.evidence.decision import Evidence
from residency.report.evidence.wording import over
from residency.report.records.reference_runs import reference_level
from residency.report.tables.general_ability import Change, calibration, changes, mean_change
from residency.runs.views.tables import finite, majority

__all__ = ["LINES", "first_screen"]

LINES = {"joint": "all domains at once", "prompted": "shown examples", "majority": "the most frequent labels"}
"""What a score is held against beside the base model and the baseline, where it was run or is known."""


def first_screen(case: Case) -> list[dict[str, Any]]:
    """One row per scorer, then what became of general ability and of calibration.

    Columns: score, domains (those that have the scorer), before (base model), joint, prompted, majority, baseline,
    leader, baseline error, leader error (standard errors of changes on benchmarks), better by, low, high, interval, p,
    evidence. Scores in the direction that tables print; `better by` above 0 is good.
    """
    if not case.means["average"]:
        return []
    rows = [_score(case, scorer) for scorer in (case.records.scorer, *case.findings.tasks)]
    return [_COLUMNS | row for row in (*rows, *_probes(case), *_benchmarks(case), *_calibration(case))]


_COLUMNS: dict[str, Any] = dict.fromkeys(
    [
        *("score", "domains", "before", *LINES, "baseline", "leader", "baseline error", "leader error"),
        *("better by", "low", "high", "interval", "p", "evidence"),
    ]
)


def _score(case: Case, scorer: str) -> dict[str, Any]:
    found, higher = case.evidence("average", scorer), case.higher(scorer)
    before = case.findings.mean_before(scorer)
    sign = printed_sign("average", higher_is_better=higher)
    columns = case.findings.columns(scorer)
    return {
        "score": f"{printable(scorer)}, {'higher' if higher else 'lower'} is better",
        "domains": ", ".join(map(printable, columns)),
        "before": None if before is None else sign * before,
        **{kind: reference_level(case.records, kind, scorer, columns) for kind in ("joint", "prompted")},
        "majority": _majority(case, scorer, columns),
        "baseline": case.printed(case.base, "average", scorer),
        "leader": case.printed(case.best, "average", scorer),
        **_evidence(found),
    }


def _majority(case: Case, scorer: str, columns: Sequence[str]) -> float | None:
    """What the most frequent labels would score, averaged over the same domains."""
    record = next((e.record for arm in case.of(case.base) for e in arm.done), {})
    lines = [line for name in columns if (line := majority(record, scorer, name)) is not None]
    return fmean(lines) if lines and len(lines) == len(columns) else None


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
    own, base = (changes(case.of(value)) for value in (case.best, case.base))
    rows = []
    for name, ours in own.items():
        theirs, worst = base.get(name, {}), min(ours, key=lambda benchmark: ours[benchmark].value)
        count = f"{len(ours)} benchmark{'s' * (len(ours) != 1)}, mean"
        sides = mean_change(ours), mean_change(theirs) if theirs.keys() == ours.keys() else None
        rows.append(_change(f"{printable(name)}, change (+ is better)", count, *sides))
        rows.append(_change(f"{printable(name)}, worst change", printable(worst), ours[worst], theirs.get(worst)))
    return rows


def _change(score: str, domains: str, leader: Change, baseline: Change | None) -> dict[str, Any]:
    row: dict[str, Any] = {"score": score, "domains": domains, "before": 0.0}
    for side, change in (("leader", leader), ("baseline", baseline)):
        row |= {side: change and change.value, f"{side} error": change and change.error}
    return row


def _calibration(case: Case) -> list[dict[str, Any]]:
    """How far stated and true probabilities of answer tokens lie apart, before training and at the end."""
    own, base = (calibration(case.of(value)) for value in (case.best, case.base))
    if own is None:
        return []
    row: dict[str, Any] = {"score": "calibration error (ECE), lower is better", "domains": ", ".join(own[2])}
    return [row | {"before": own[0], "baseline": base and base[1], "leader": own[1]}]


def _evidence(found: Evidence | None) -> dict[str, Any]:
    if found is None:
        return {}
    ends = {"low": finite(found.found.low), "high": finite(found.found.high), "interval": over(found)}
    return {"better by": finite(found.estimate), **ends, "p": finite(found.p), "evidence": found.word}
