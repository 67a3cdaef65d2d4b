"""Runs that a study adds to compare with: the base model, each domain alone, all domains at once, a part per domain.

None of them is a method: they are told apart from the arms, and never recommended. Joint training is no upper bound
either: single domains can be better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from residency.metrics.discovery import MatrixMetric, matrix_metrics
from residency.metrics.statistics import t_interval
from residency.report.records.arms import Arm
from residency.report.records.records import Entry, Records
from residency.runs.views.tables import printable, score_at

__all__ = ["beside_references", "reference_level", "reference_rows"]

_CALLED = {
    "frozen": "base model, untrained",
    "prompted": "base model, shown examples",
    "independent": "each domain alone",
    "joint": "all domains at once (joint)",
    "per_domain": "a part per domain",
}


def reference_rows(records: Records, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """One row per kind and setting: method, average over the stream's domains, with its interval over seeds.

    The base model needs no run of its own: row 0 of every matrix is it.
    """
    first = next((arm for arm in arms if arm.done), None)
    rows = []
    for (kind, place), entries in _groups(records, records.scorer).items():
        domains = [*first.done[0].record["domains"]] if first else _own(entries)
        values = [v for v in _by_seed(entries, records.scorer, domains).values() if v is not None]
        if values:
            setting = " · ".join(value for _, value in place)
            rows.append(_row(f"{_CALLED.get(kind, kind)}{f' · {setting}' if setting else ''}", kind, values))
    base = first.base() if first else None
    if base is not None and not any(row["kind"] == "frozen" for row in rows):
        rows.insert(0, _row(_CALLED["frozen"], "frozen", [base]) | {"seeds": None})
    return rows


def reference_level(records: Records, kind: str, scorer: str, domains: Sequence[str]) -> float | None:
    """Mean of a reference's scores at the end over some domains, its settings and seeds, as recorded.

    `None` where no such reference was run, or one has no score on a domain.
    """
    groups = [own for (found, _), own in _groups(records, scorer).items() if found == kind]
    values = [value for own in groups for value in _by_seed(own, scorer, domains).values()]
    known = [value for value in values if value is not None]
    return fmean(known) if known and domains and len(known) == len(values) else None


def _groups(records: Records, scorer: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], list[Entry]]:
    """(kind, its place on the axes) -> reference runs that have a scorer."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[Entry]] = {}
    for entry in records.done:
        if entry.reference is not None and scorer in (entry.record.get("scores") or {}):
            place = tuple((printable(k), printable(v)) for k, v in entry.record["axes"].items())
            groups.setdefault((entry.reference, place), []).append(entry)
    return groups


def beside_references(records: Records, arm: Arm) -> dict[str, float | None]:
    """Metrics that need scores of other models: against joint training, and against each domain alone.

    Mean over the arm's seeds; `None` where a reference or a score is missing, nothing where no reference was run.
    """
    found: dict[str, float | None] = {}
    for metric in matrix_metrics().values():
        kind = {"joint": "joint", "single": "independent"}.get(metric.about.needs or "")
        own = [e for e in records.done if kind is not None and e.reference == kind]
        own = [e for e in own if records.scorer in e.record["scores"]]
        if own:
            values = [_beside(metric, entry, own, records.scorer) for entry in arm.done]
            known = [v for v in values if math.isfinite(v)]
            found[metric.name] = fmean(known) if known and len(known) == len(values) else None
    return found


def _beside(metric: MatrixMetric, entry: Entry, references: Sequence[Entry], scorer: str) -> float:
    domains = list(entry.record["domains"])
    scores = [_last(references, scorer, domain) for domain in domains]
    R = [row[: len(domains)] for row in entry.record["scores"][scorer]["R"]]
    higher = bool(entry.record["scores"][scorer]["higher_is_better"])
    return metric(R, higher_is_better=higher, **{str(metric.about.needs): scores})


def _last(references: Sequence[Entry], scorer: str, domain: str) -> float:
    """Mean of the references' last scores on a domain; of a run on one domain its other columns are none."""
    found = []
    for entry in references:
        record = entry.record
        columns = [*record["domains"], *(record.get("probes") or [])]
        if domain in (record["domains"] if entry.reference == "independent" else columns):
            matrix = record["scores"][scorer]["R"]
            found.append(score_at(matrix, len(matrix) - 1, columns.index(domain)))
    known = [value for value in found if value is not None]
    return fmean(known) if known else math.nan


def _row(name: str, kind: str, values: Sequence[float]) -> dict[str, Any]:
    row: dict[str, Any] = {"method": name, "role": "reference", "kind": kind, "baseline": False, "seeds": len(values)}
    row |= {"average": fmean(values), "told the domain": kind in ("independent", "per_domain")}
    if len(values) > 1:
        found = t_interval(values)
        row |= {"average low": found.low, "average high": found.high, "average sd": stdev(values)}
    return row


def _own(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in entry.record["domains"]))


def _by_seed(entries: Sequence[Entry], scorer: str, domains: Sequence[str]) -> dict[Any, float | None]:
    """Seed -> mean over the domains of the last scores; `None` where a domain has none."""
    found: dict[Any, dict[str, float]] = {}
    for entry in entries:
        record = entry.record
        columns = [*record["domains"], *(record.get("probes") or [])]
        matrix = record["scores"][scorer]["R"]
        # Of a run on one domain the other columns are no reference.
        kept = record["domains"] if entry.reference == "independent" else domains
        for j, column in enumerate(columns):
            value = score_at(matrix, len(matrix) - 1, j)
            if column in kept and value is not None:
                found.setdefault(record.get("seed"), {})[column] = value
    return {seed: fmean(own[d] for d in domains) if {*domains} <= {*own} else None for seed, own in found.items()}
