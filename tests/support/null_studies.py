"""Studies with known truth, in memory: random effects of seeds and rows, crossed as in the model of `crossed`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from residency.report.evidence.effects import Factorial
from residency.report.evidence.samples import RowScores
from residency.report.records.records import Entry

DOMAINS = ("law", "medicine", "code")


def factorial(
    axes: Mapping[str, Sequence[str]],
    *,
    seeds: Sequence[int],
    truth: Mapping[tuple[str, str], float] | None = None,
    rows: int = 16,
    by_seed: float = 0.05,
    by_row: float = 0.4,
    noise: float = 0.3,
    missing: float = 0.0,
    draw: int = 0,
    stored_rows: bool = True,
) -> Factorial:
    """A study whose cells score `accuracy`-like numbers; `truth` adds (axis, value) -> effect to all rows.

    Every combination of values has an effect of each seed, of each row, and of each row under each seed, all of its
    own: so differences between two combinations have them too. `missing` is the share of cells that were never run.
    """
    rng = np.random.default_rng(draw)
    entries, read = [], {}
    for values in product(*axes.values()):
        place = dict(zip(axes, values, strict=True))
        shift = sum((truth or {}).get(item, 0.0) for item in place.items())
        row_effect = rng.normal(0, by_row, (len(DOMAINS), rows))
        for seed in seeds:
            x = shift + rng.normal(0, by_seed) + row_effect + rng.normal(0, noise, row_effect.shape)
            if rng.random() < missing and seed != seeds[0]:
                continue
            folder = Path(f"{'-'.join(values)}-{seed}")
            R = np.vstack([np.zeros(len(DOMAINS)), np.repeat(x.mean(1)[None], len(DOMAINS), 0)])
            entries.append(Entry(record=_record(place, seed, R), folder=folder))
            for stage in range(len(DOMAINS) + 1):
                own = {("score", d): (x[j], np.ones(rows)) for j, d in enumerate(DOMAINS)}
                read[folder, stage] = own if stored_rows else {}
    return Factorial(entries=entries, rows=RowScores(read))


def _record(place: Mapping[str, str], seed: int, R: Any) -> dict[str, Any]:
    return {
        "cell": f"{place}-{seed}",
        "status": "done",
        "axes": dict(place),
        "seed": seed,
        "domains": list(DOMAINS),
        "probes": [],
        "scores": {"score": {"higher_is_better": True, "unit": "points", "R": R.tolist()}},
    }
