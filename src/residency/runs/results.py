"""The record of a finished run (design, section 7), assembled from its stages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from residency.core.environment import versions
from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.metrics.matrix import summary
from residency.runs.judgement import judgement
from residency.runs.views.base import RunInfo
from residency.scorers.base import ScoreInfo

__all__ = ["build_record", "score_infos", "score_matrices", "summaries"]


def build_record(
    *, module: ContinualModule, data: StreamData, info: RunInfo, stages: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What results.json holds.

    Args:
        module: As trained.
        data: Domains and probes.
        info: Name, seed, sizes.
        stages: The records of row 0 and of every stage.
    """
    columns = list(data.columns)
    scores = score_matrices([stage["means"] for stage in stages], columns, score_infos(module, data))
    backbone = module.backbone
    return {
        "cell": info.cell,
        "status": "done",
        "axes": dict(info.axes),
        "seed": info.seed,
        "split": info.split,
        "domains": data.order,
        "probes": list(data.probes),
        "task_id_at_test": _uses_task_id(module),
        "scores": scores,
        "summary": summaries(scores, domains=len(data.order)),
        **judgement(scores, data=data, stages=stages),
        "cost": _cost(stages, info),
        "provenance": {
            "versions": versions(),
            "backbone": backbone.describe(),
            "layout": info.layout,
            "fingerprints": {"backbone": backbone.fingerprint(), "data": dict(data.fingerprints())},
            "licences": {name: domain.licence for name, domain in data.columns.items()},
        },
    }


def _uses_task_id(module: ContinualModule) -> bool:
    """Whether anything that takes part needs the domain of a row in order to score it."""
    told = module.backbone.task_id_at_test or module.adapter.task_id_at_test
    return told or any(m.task_id_at_test for m in module.mitigations.values())


def _cost(stages: Sequence[Mapping[str, Any]], info: RunInfo) -> dict[str, Any]:
    trained = stages[1:]
    seconds, before, after = (
        sum(stage.get(f"{part}_seconds", 0.0) for stage in trained for part in parts)
        for parts in (("train",), ("prepare", "augment"), ("finish",))
    )
    # What the run would cost alone, also where it shared a stage with others: runs are compared by it.
    scoring = sum(stage["evaluation_seconds"] for stage in stages)
    tokens, flops, batches = (
        sum(stage.get(part, 0) for stage in trained for part in parts)
        for parts in (
            ("train_tokens", "finish_tokens", "augment_tokens"),
            ("train_flops", "finish_flops"),
            ("batch_tokens",),
        )
    )
    return {
        "seconds": before + seconds + after + scoring,
        "prepare_seconds": before,
        "train_seconds": seconds,
        "finish_seconds": after,
        "evaluation_seconds": scoring,
        "train_tokens": tokens,
        "batch_tokens": batches,
        "tokens_per_second": batches / seconds if seconds else None,
        "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in trained),
        "trainable_parameters": info.trainable,
        "total_parameters": info.total,
        "mitigation_state_bytes": _most(stage["mitigation_state_bytes"] for stage in trained),
        "optimizer_state_bytes": max(stage.get("optimizer_state_bytes", 0) for stage in trained),
        "training_flops": float(flops),
        "evaluation_tokens": sum(stage.get("evaluation_tokens", 0) for stage in stages),
        "evaluation_flops": float(sum(stage.get("evaluation_flops", 0) for stage in stages)),
    }


def _most(stages: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Per mitigation, the most that it held in any stage."""
    found: dict[str, int] = {}
    for stage in stages:
        found |= {name: max(size, found.get(name, 0)) for name, size in stage.items()}
    return found


def score_infos(module: ContinualModule, data: StreamData) -> dict[str, ScoreInfo]:
    """{score: what it is} of every score that the domains ask for, then of those that the adapter adds."""
    asked = {name: s.info() for domain in data.columns.values() for name, s in domain.scorers.items()}
    return asked | dict(module.adapter.scorers)


def score_matrices(
    rows: Sequence[Mapping[str, Mapping[str, float]]], columns: Sequence[str], infos: Mapping[str, ScoreInfo]
) -> dict[str, Any]:
    """Rows of means -> the `scores` entry of the record.

    Args:
        rows: {scorer: {column: mean}} before training and after each stage, T+1 of them.
        columns: Domains in order, then probes.
        infos: {scorer: what it is}.

    Returns:
        {scorer: {higher_is_better, unit, R}}; a missing cell is `None`.
    """
    names = [name for name in infos if any(name in row for row in rows)]
    return {
        name: {
            "higher_is_better": infos[name].higher_is_better,
            "unit": infos[name].unit,
            "R": [[row.get(name, {}).get(column) for column in columns] for row in rows],
        }
        for name in names
    }


def summaries(scores: Mapping[str, Any], *, domains: int) -> dict[str, dict[str, float | None]]:
    """Summary of every scorer over the domains (not the probes); what cannot be computed is `None`."""
    found = {}
    for name, entry in scores.items():
        matrix = [[math.nan if v is None else v for v in row[:domains]] for row in entry["R"]]
        values = summary(matrix, higher_is_better=entry["higher_is_better"])
        found[name] = {key: (value if math.isfinite(value) else None) for key, value in values.items()}
    return found
