"""The findings of what was read from disk."""

from __future__ import annotations

from collections.abc import Sequence

from residency.report.evidence.effects import Factorial
from residency.report.evidence.findings import Findings, task_scorers
from residency.report.evidence.samples import RowScores
from residency.report.records.arms import Arm
from residency.report.records.records import Records

__all__ = ["findings_of"]

# Reading rows takes some milliseconds per run and stage; beyond so many the intervals are over seeds alone, and say so.
_READ = 6000


def findings_of(records: Records, arms: Sequence[Arm]) -> Findings:
    """All evidence of a page about some runs or studies.

    Args:
        records: What was read.
        arms: Its arms.
    """
    entries = [entry for arm in arms for entry in arm.entries if entry.done and entry.record.get("scores")]
    stages = sum(len(entry.record["domains"]) + 1 for entry in entries)
    scorers = [name for entry in entries for name in entry.record["scores"]]
    study = Factorial(
        entries=entries,
        baselines={records.subject: records.baseline},
        rows=RowScores(enabled=stages <= _READ),
    )
    told = {arm.value for arm in arms if arm.oracle}
    honest = {arm.value for arm in arms} - told
    return Findings(
        study=study,
        subject=records.subject,
        scorer=records.scorer,
        tasks=task_scorers(scorers, records.scorer),
        # Where all were told, they are compared with each other.
        excluded=frozenset(told) if honest else frozenset(),
    )
