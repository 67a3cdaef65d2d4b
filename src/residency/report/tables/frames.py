"""The tables of a report as polars frames: the same ones give the page, CSV, Parquet and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import polars as pl

from residency.metrics.crossed import Crossed, crossed
from residency.metrics.discovery import matrix_metrics
from residency.report.advice.case import Case
from residency.report.evidence.decision import Evidence
from residency.report.evidence.findings import Findings
from residency.report.evidence.samples import columns_with
from residency.report.evidence.wording import over, sentence
from residency.report.records.arms import Arm
from residency.report.records.records import Records
from residency.report.records.reference_runs import beside_references, reference_rows
from residency.report.tables.first_screen import first_screen
from residency.report.tables.flips import flips
from residency.report.tables.general_ability import benchmark_rows
from residency.runs.views.tables import finite, majority, printable

__all__ = ["Frames", "frames_of"]

METRICS = ("average", "learning", "forgetting")


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The tables.

    Args:
        methods: One row per arm: scores with intervals, against the baseline, costs, notes; references and the base
            model are rows too (`role`).
        first: One row per score of the first screen: whom the page is about against the baseline, with the evidence.
        comparisons: One row per claim of the page, with all that was decided about it.
        benchmarks: One row per arm and benchmark of lm-eval: change since before training with its standard error.
        flips: Answers that became wrong or right, against when just learnt and against the baseline.
        scores: One row per arm, stage and column: the score matrices, averaged over seeds.
        domains: One row per arm and domain: before training, right after learning, at the end, forgotten.
        costs: One row per arm.
        cells: One row per cell, also of those that are missing.
    """

    methods: pl.DataFrame
    first: pl.DataFrame
    comparisons: pl.DataFrame
    benchmarks: pl.DataFrame
    flips: pl.DataFrame
    scores: pl.DataFrame
    domains: pl.DataFrame
    costs: pl.DataFrame
    cells: pl.DataFrame

    def items(self) -> dict[str, pl.DataFrame]:
        """Name -> frame, those that have rows."""
        return {name: frame for name, frame in vars(self).items() if frame.height}


def frames_of(records: Records, arms: Sequence[Arm], findings: Findings) -> Frames:
    """All tables of a report."""
    scores = [{"method": arm.name, **row} for arm in arms for row in arm.stages]
    return Frames(
        methods=_frame(_methods(records, arms, findings)),
        first=_frame(first_screen(Case(records=records, arms=arms, findings=findings))),
        comparisons=_frame([_comparison(e) for e in findings.evidence]),
        benchmarks=_frame(benchmark_rows(arms)),
        flips=_frame(flips(records, arms, findings)),
        scores=_frame(scores),
        domains=_frame([row for arm in arms for row in _domains(arm)]),
        costs=_frame([_costs(arm) for arm in arms if arm.done]),
        cells=_frame([_cell(records, index) for index in range(len(records.entries))]),
    )


def _frame(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, infer_schema_length=None) if rows else pl.DataFrame()


def _methods(records: Records, arms: Sequence[Arm], findings: Findings) -> list[dict[str, Any]]:
    axes = list(dict.fromkeys(axis for arm in arms for axis, _ in arm.place))
    rows = []
    for arm in arms:
        place = dict(arm.place)
        row: dict[str, Any] = {"method": arm.name, "role": "train"}
        row |= {f"axis: {axis}": place.get(axis) for axis in axes if len(axes) > 1}
        row |= {"baseline": arm.value == records.baseline, "seeds": len(arm.done)}
        for metric in METRICS:
            low, high, kind = _interval(arm, metric, findings)
            row |= {
                metric: arm.mean(metric),
                f"{metric} low": low,
                f"{metric} high": high,
                f"{metric} sd": arm.sd(metric),
            }
            row.setdefault("interval", kind)
        row |= {name: arm.mean(name) for name in matrix_metrics() if name not in METRICS}
        row |= beside_references(records, arm)
        found = findings.of(arm.value)
        row["better by"] = found.estimate if found else None
        row["p"] = finite(found.p) if found else None
        row["evidence"] = found.word if found else None
        row |= _probes(arm)
        row |= {"seconds": arm.cost("seconds"), "state bytes": arm.cost("mitigation_state_bytes")}
        rows.append(row | {"told the domain": arm.oracle, "note": "; ".join(arm.notes())})
    return [*rows, *({k: v for k, v in row.items() if k != "kind"} for row in reference_rows(records, arms))]


def _interval(arm: Arm, metric: str, findings: Findings) -> tuple[float | None, float | None, str | None]:
    """95 % interval of a metric in its printed direction, over seeds and rows; of one seed over its rows."""
    columns = columns_with(arm.done, arm.scorer)
    samples = [findings.study.sample(entry, arm.scorer, metric, columns) for entry in arm.done]
    known = [sample for sample in samples if sample is not None]
    if not known or len(known) < len(samples):
        return None, None, None
    parts = [sample.parts for sample in known if sample.parts is not None]
    found: Crossed = crossed([s.value for s in known], parts if len(parts) == len(known) else None)
    if math.isnan(found.low):
        return None, None, None
    # Samples are utilities; forgetting is printed as a loss, and a loss as a loss.
    flip = metric == "forgetting" or not arm.higher_is_better
    return (-found.high, -found.low, found.basis) if flip else (found.low, found.high, found.basis)


def _probes(arm: Arm) -> dict[str, Any]:
    """General ability since the base model, as utilities: the mean over probes, and the worst, which a mean hides."""
    start: dict[str, float] = {}
    end: dict[str, float] = {}
    for row in arm.stages:
        if row["probe"] and row["score"] is not None:
            if row["stage"] == 0:
                start[row["column"]] = row["score"]
            end[row["column"]] = row["score"]
    sign = 1 if arm.higher_is_better else -1
    deltas = [sign * (end[name] - start[name]) for name in start]
    if not deltas:
        return {}
    return {"probes mean change": fmean(deltas), "probes worst change": min(deltas)}


def _comparison(e: Evidence) -> dict[str, Any]:
    claim, found = e.claim, e.found
    return {
        "axis": claim.axis,
        "method": claim.a,
        "against": claim.b,
        "metric": claim.metric,
        "scorer": claim.scorer,
        "domains": ", ".join(map(printable, claim.columns)),
        "seeds": found.seeds,
        "settings": claim.settings,
        "rows": found.rows,
        "better by": finite(found.estimate),
        "low": finite(found.low),
        "high": finite(found.high),
        "interval": over(e),
        "noise floor": finite(found.noise_floor),
        "p": finite(found.p),
        "p Holm": finite(e.p),
        "p exact": finite(e.p_exact),
        "smallest p exact": e.smallest_p,
        "family": e.family,
        "effect size": finite(e.effect_size),
        "evidence": e.word,
        "in words": sentence(e),
    }


def _domains(arm: Arm) -> list[dict[str, Any]]:
    cells: dict[str, dict[str, Any]] = {}
    for row in arm.stages:
        own = cells.setdefault(row["column"], {"method": arm.name, "domain": row["column"]})
        own["probe"] = row["probe"]
        if row["stage"] == 0:
            own["before"] = row["score"]
        if row["learned"]:
            own["learned"] = row["score"]
        own["end"] = row["score"]
    for own in cells.values():
        learned, end = own.get("learned"), own.get("end")
        start = own.get("before") if own["probe"] else learned
        lost = None if start is None or end is None else start - end if arm.higher_is_better else end - start
        own |= {"before": own.get("before"), "learned": learned, "forgotten": lost}
        own["majority"] = majority(arm.done[0].record, arm.scorer, own["domain"]) if arm.done else None
    return list(cells.values())


def _costs(arm: Arm) -> dict[str, Any]:
    return {
        "method": arm.name,
        "seconds": arm.cost("seconds"),
        "seconds before the first steps": arm.cost("prepare_seconds"),
        "training seconds": arm.cost("train_seconds"),
        "seconds after the last steps": arm.cost("finish_seconds"),
        "scoring seconds": arm.cost("evaluation_seconds"),
        "tokens": arm.cost("train_tokens"),
        "tokens per second": arm.cost("tokens_per_second"),
        "peak memory bytes": arm.cost("peak_memory_bytes"),
        "extra state bytes": arm.cost("mitigation_state_bytes"),
        "optimizer bytes": arm.cost("optimizer_state_bytes"),
        "trainable parameters": arm.cost("trainable_parameters"),
        "total parameters": arm.cost("total_parameters"),
        "FLOPs": arm.cost("training_flops"),
    }


def _cell(records: Records, index: int) -> dict[str, Any]:
    entry = records.entries[index]
    record = entry.record
    return {
        "cell": printable(record.get("cell", "?")),
        "status": printable(record.get("status")),
        "role": entry.role,
        "seed": None if record.get("seed") is None else str(record["seed"]),
        "axes": ", ".join(f"{printable(k)}: {printable(v)}" for k, v in record["axes"].items()),
        "domains": " → ".join(map(printable, record.get("domains") or [])),
    }
