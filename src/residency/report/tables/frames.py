"""The tables of a report as polars frames: the same ones give the page, CSV, Parquet and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import polars as pl

from residency.report.records.arms import Arm
from residency.report.records.contrasts import METRICS, Contrast, example_interval
from residency.report.records.records import Records
from residency.report.records.reference_runs import reference_rows
from residency.runs.views.tables import finite, printable

__all__ = ["Frames", "frames_of"]

# Resampling examples for a single-seed arm takes some milliseconds; beyond so many arms intervals are left out.
_RESAMPLED = 60


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The tables.

    Args:
        methods: One row per arm: scores with intervals, against the baseline, costs, notes; references and the base
            model are rows too (`role`).
        comparisons: One row per arm and metric against the baseline.
        scores: One row per arm, stage and column: the score matrices, averaged over seeds.
        domains: One row per arm and domain: before training, right after learning, at the end, forgotten.
        costs: One row per arm.
        cells: One row per cell, also of those that are missing.
    """

    methods: pl.DataFrame
    comparisons: pl.DataFrame
    scores: pl.DataFrame
    domains: pl.DataFrame
    costs: pl.DataFrame
    cells: pl.DataFrame

    def items(self) -> dict[str, pl.DataFrame]:
        """Name -> frame, those that have rows."""
        return {name: frame for name, frame in vars(self).items() if frame.height}


def frames_of(records: Records, arms: Sequence[Arm], contrasts: Sequence[Contrast]) -> Frames:
    """All tables of a report."""
    scores = [{"method": arm.name, **row} for arm in arms for row in arm.stages]
    return Frames(
        methods=_frame(_methods(records, arms, contrasts)),
        comparisons=_frame([_comparison(c) for c in contrasts]),
        scores=_frame(scores),
        domains=_frame([row for arm in arms for row in _domains(arm)]),
        costs=_frame([_costs(arm) for arm in arms if arm.done]),
        cells=_frame([_cell(records, index) for index in range(len(records.entries))]),
    )


def _frame(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, infer_schema_length=None) if rows else pl.DataFrame()


def _methods(records: Records, arms: Sequence[Arm], contrasts: Sequence[Contrast]) -> list[dict[str, Any]]:
    against = {(c.name, c.metric): c for c in contrasts}
    axes = list(dict.fromkeys(axis for arm in arms for axis, _ in arm.place))
    rows = []
    for number, arm in enumerate(arms):
        place = dict(arm.place)
        row: dict[str, Any] = {"method": arm.name, "role": "train"}
        row |= {f"axis: {axis}": place.get(axis) for axis in axes if len(axes) > 1}
        row |= {"baseline": arm.value == records.baseline, "seeds": len(arm.done)}
        for metric in METRICS:
            low, high, kind = _interval(arm, metric, resample=number < _RESAMPLED)
            row |= {
                metric: arm.mean(metric),
                f"{metric} low": low,
                f"{metric} high": high,
                f"{metric} sd": arm.sd(metric),
            }
            row.setdefault("interval", kind)
        row |= {name: arm.mean(name) for name in ("bwt", "fwt", "anytime_average", "relative_forgetting")}
        contrast = against.get((arm.name, "average"))
        row["better by"] = contrast.seeds.difference if contrast else None
        row["p"] = contrast.seeds.p_adjusted if contrast and contrast.seeds.n > 1 else None
        row["outcome"] = contrast.seeds.outcome if contrast else None
        row |= _probes(arm)
        row |= {"seconds": arm.cost("seconds"), "state bytes": arm.cost("mitigation_state_bytes")}
        rows.append(row | {"told the domain": arm.oracle, "note": "; ".join(arm.notes())})
    return [*rows, *({k: v for k, v in row.items() if k != "kind"} for row in reference_rows(records, arms))]


def _interval(arm: Arm, metric: str, *, resample: bool) -> tuple[float | None, float | None, str | None]:
    """95 % interval of a metric in its printed direction: over seeds, or else over examples."""
    over_seeds = arm.interval(metric)
    if over_seeds is not None:
        return over_seeds.low, over_seeds.high, "seeds (t)"
    found = example_interval(arm, metric) if resample and arm.done else None
    if found is None:
        return None, None, None
    # As a utility; a loss is printed as a loss. Forgetting is a cost already.
    flip = metric != "forgetting" and not arm.higher_is_better
    return (-found.high, -found.low, "test rows") if flip else (found.low, found.high, "test rows")


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


def _comparison(c: Contrast) -> dict[str, Any]:
    seeds, examples = c.seeds, c.examples
    known = seeds.n > 1
    return {
        "method": c.name,
        "against": seeds.b,
        "metric": c.metric,
        "seeds": seeds.n,
        "better by": seeds.difference,
        "seeds low": seeds.interval.low if known else None,
        "seeds high": seeds.interval.high if known else None,
        "bootstrap low": examples.low if examples else None,
        "bootstrap high": examples.high if examples else None,
        "p": finite(seeds.p),
        "smallest p": seeds.smallest_p,
        "p Holm": finite(seeds.p_adjusted),
        "effect size": finite(seeds.effect_size),
        "P(better)": finite(seeds.improvement),
        "outcome": seeds.outcome,
        "verdict": seeds.verdict,
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
