"""Studies that were never run: records as design 7 has them, with the figures of the quickstart or made up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from residency.engine.scoring.row_scores import RowScore
from residency.metrics.matrix import summary
from residency.runs.folder import RunFolder

__all__ = ["QUICKSTART", "write_cell", "write_study"]

# What each mitigation of the quickstart did to the losses of medical, legal, code (first digits are real).
QUICKSTART = {
    "none": [[5.54, 11.54, 4.02], [1.46, 9.61, 4.31], [3.10, 0.84, 4.62], [3.80, 4.36, 2.04]],
    "replay": [[5.54, 11.54, 4.02], [1.46, 9.61, 4.31], [1.12, 0.92, 3.60], [1.16, 1.74, 2.07]],
    "ewc": [[5.54, 11.54, 4.02], [1.46, 9.61, 4.31], [1.40, 0.84, 4.10], [1.42, 3.60, 2.15]],
    "mixing": [[5.54, 11.54, 4.02], [1.46, 9.61, 4.31], [1.58, 1.29, 3.90], [1.87, 2.60, 2.11]],
}
_COST = {"none": (301.0, 0), "replay": (322.0, 43_000), "ewc": (355.0, 19_500_000), "mixing": (308.0, 0)}
_UNITS = {"nll": "nats per completion token", "accuracy": "share of rows whose own label is the most likely one"}


def write_study(
    folder: Path,
    matrices: Mapping[str, Sequence[Sequence[float]]] = QUICKSTART,
    *,
    domains: Sequence[str] = ("medical", "legal", "code"),
    probes: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    rows: int = 32,
    spread: float = 0.05,
    more_axes: Mapping[str, str] | None = None,
    unfinished: Sequence[str] = (),
    baseline: str = "none",
) -> Path:
    """A whole study folder; `unfinished` names cells that left no results."""
    cells = []
    for value, matrix in matrices.items():
        for seed in seeds:
            cell = f"{value}-s{seed}"
            axes = {"mitigation": value, **(more_axes or {})}
            cells.append({"id": cell, "axes": axes, "seed": seed})
            if cell not in unfinished:
                place = folder / "cells" / cell
                write_cell(place, cell, matrix, axes, seed, domains, probes, rows=rows, spread=spread)
    study = {"name": folder.name, "scorer": "nll", "baseline": baseline, "seeds": [*seeds], "axes": {"mitigation": {}}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps({"study": study, "count": len(cells), "cells": cells}))
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder


def write_cell(
    folder: Path,
    cell: str,
    matrix: Sequence[Sequence[float]],
    axes: Mapping[str, Any],
    seed: int,
    domains: Sequence[str],
    probes: Sequence[str] = (),
    *,
    rows: int = 32,
    spread: float = 0.05,
) -> None:
    """One finished run with its examples (none for `rows` = 0), history and config."""
    rng = np.random.default_rng(seed)
    names = [*domains, *probes]
    R = np.array(matrix, dtype=float)
    R[1:] *= 1 + spread * rng.standard_normal((len(R) - 1, 1))
    folder.mkdir(parents=True, exist_ok=True)
    means = {"nll": R, "accuracy": np.clip(0.9 - R / 8, 0.02, 0.98)}
    for k in range(len(R) if rows else 0):
        table = []
        for j, name in enumerate(names):
            own = np.random.default_rng(j)  # the same examples for everybody
            values = own.gamma(4, 1, rows)
            tokens = own.integers(3, 12, rows)
            values *= R[k, j] / np.average(values, weights=tokens)
            right = own.random(rows).argsort() < round(means["accuracy"][k, j] * rows)
            for i in range(rows):
                count = int(tokens[i])
                table.append(RowScore(name, f"{i:03}", "nll", float(values[i]), count, weight=count))
                table.append(RowScore(name, f"{i:03}", "accuracy", float(right[i]), count))
            means["accuracy"][k, j] = right.mean()
        stage = RunFolder(folder).stage(k, "base" if k == 0 else domains[k - 1])
        stage.mkdir(parents=True, exist_ok=True)
        RunFolder(folder).complete_stage(stage, table, {"stage": k})
    scores = {
        s: {"higher_is_better": s != "nll", "unit": _UNITS[s], "R": [[float(v) for v in row] for row in M]}
        for s, M in means.items()
    }
    count = len(domains)
    found = {
        s: {
            k: (float(v) if np.isfinite(v) else None)
            for k, v in summary(M[:, :count], higher_is_better=s != "nll").items()
        }
        for s, M in means.items()
    }
    kind = str(axes.get("mitigation", cell))
    seconds, state = _COST.get(kind, (300.0 + len(kind), 1000 * len(kind)))
    record = {
        "schema": 1,
        "cell": cell,
        "status": "done",
        "axes": dict(axes),
        "seed": seed,
        "domains": [*domains],
        "probes": [*probes],
        "task_id_at_test": False,
        "scores": scores,
        "summary": found,
        "cost": {
            "seconds": seconds,
            "train_seconds": 0.7 * seconds,
            "evaluation_seconds": 0.3 * seconds,
            "train_tokens": 36 * 8 * 60,
            "tokens_per_second": 36 * 8 * 60 / (0.7 * seconds),
            "peak_memory_bytes": 3_000_000_000,
            "trainable_parameters": 2_442_240,
            "total_parameters": 136_957_248,
            "mitigation_state_bytes": state,
        },
        "provenance": {
            "versions": {"python": "3.11.7", "torch": "2.13.0", "lightning": "2.6.6"},
            "backbone": {"name": "SmolLM2-135M-Instruct"},
            "layout": "packed: exact on this model (checked)",
            "fingerprints": {"backbone": "ab" * 32, "data": dict.fromkeys(names, "cd" * 32)},
            "licences": dict.fromkeys(names, "CC-BY-4.0"),
        },
    }
    config = {
        "name": cell,
        "seed_everything": seed,
        "model": {
            "adapter": {"class_path": "peft.LoraConfig", "init_args": {"r": 8}},
            "mitigations": {kind: {"class_path": f"residency.mitigations.{kind.title()}"}} if kind != "none" else {},
        },
        "data": {"batch_size": 8},
        "trainer": {"max_steps": 12},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    lines = [
        {"stage": 1 + i // 12, "domain": domains[i // 12], "step": 1 + i % 12, "stream_step": 1 + i}
        | {"loss": 4.0 / (1 + i % 12), "loss/task": 4.0 / (1 + i % 12)}
        for i in range(12 * count)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "results.json").write_text(json.dumps(record, ensure_ascii=False))
