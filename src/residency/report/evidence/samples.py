"""What one run says about one metric: a number, and what every test row contributed to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from residency.core.parquet_files import ParquetRefused
from residency.core.text import printable
from residency.metrics.crossed import FloatArray, Parts, influence
from residency.report.records.records import Entry

__all__ = ["METRICS", "RowScores", "Sample", "columns_with", "combined", "sample_of"]

METRICS = ("average", "learning", "forgetting", "general")
"""average: after the last stage; learning: right after each domain's own; forgetting: best since then minus the end, of
all domains but the last; general: change of the probes since before training. All are utilities: higher is better."""

_Scored = tuple[FloatArray, FloatArray]  # values and weights in the mean, rows in the order of their names


@dataclass(frozen=True, slots=True)
class Sample:
    """A metric of one run, as a utility.

    Args:
        value: The metric.
        parts: Contributions of the rows, whose means over rows add up to `value`; `None` where rows are not at hand.
    """

    value: float
    parts: Parts | None


class _Term(NamedTuple):
    """share · (u[plus, column] - u[minus, column]), without the second part where `minus` is `None`."""

    column: int
    plus: int
    minus: int | None
    share: float


@dataclass
class RowScores:
    """Scores of single rows, read once per stage of a run; files that cannot be read are remembered by cell."""

    _read: dict[tuple[Path, int], dict[tuple[str, str], _Scored]] = field(default_factory=dict)
    enabled: bool = True
    damaged: dict[str, list[int]] = field(default_factory=dict)

    def at(self, entry: Entry, stage: int, scorer: str, column: str) -> _Scored | None:
        """(values, weights) of a column after a stage; `None` where they are not at hand."""
        key = (entry.folder, stage)
        if key not in self._read:
            self._read[key] = self._by_column(entry, stage) if self.enabled else {}
        return self._read[key].get((scorer, column))

    def _by_column(self, entry: Entry, stage: int) -> dict[tuple[str, str], _Scored]:
        try:
            return _by_column(entry.examples(stage))
        except (OSError, ParquetRefused):
            self.damaged.setdefault(printable(entry.record.get("cell", "?")), []).append(stage)
            return {}

    def told(self) -> str | None:
        """What must be said about files that could not be read; `None` if there were none."""
        if not self.damaged:
            return None
        cells = [f"{cell} (stage {', '.join(map(str, sorted(own)))})" for cell, own in list(self.damaged.items())[:3]]
        more = f" and {len(self.damaged) - 3} more cells" if len(self.damaged) > 3 else ""
        return (
            f"Damaged: scores.parquet of {', '.join(cells)}{more}. Means are those of the records; what needs single "
            "test rows is judged without them. The command that made the run makes them again."
        )


def columns_with(entries: Sequence[Entry], scorer: str) -> tuple[str, ...]:
    """The domains that every run has a last score of; fewer than the stream's where a scorer does not fit all."""
    found: list[set[str]] = []
    for entry in entries:
        known = (entry.record.get("scores") or {}).get(scorer)
        if known is not None:
            domains = entry.record["domains"]
            found.append({d for d, value in zip(domains, known["R"][-1], strict=False) if value is not None})
    shared = set.intersection(*found) if found else set()
    return tuple(d for d in (entries[0].record["domains"] if entries else ()) if d in shared)


def sample_of(entry: Entry, scorer: str, metric: str, columns: Sequence[str], rows: RowScores) -> Sample | None:
    """A metric of a run over some of its domains; `None` where a score that it needs is missing.

    Args:
        entry: A finished run.
        scorer: Of its record.
        metric: One of `METRICS`.
        columns: Domains to average over; `general` takes all probes instead.
        rows: Reader of single rows.
    """
    record = entry.record
    known = (record.get("scores") or {}).get(scorer)
    if known is None:
        return None
    sign = 1.0 if known["higher_is_better"] else -1.0
    names = [*record["domains"], *(record.get("probes") or [])]
    u = sign * np.array([[math.nan if v is None else v for v in row] for row in known["R"]], dtype=np.float64)
    if u.ndim != 2 or u.shape != (len(record["domains"]) + 1, len(names)):
        return None
    terms = _terms(u, names, len(record["domains"]), metric, columns)
    value = math.fsum(
        t.share * (u[t.plus, t.column] - (0.0 if t.minus is None else u[t.minus, t.column])) for t in terms
    )
    if not terms or not math.isfinite(value):
        return None
    return Sample(value, _parts(entry, scorer, terms, names, sign, u, rows))


def _terms(u: FloatArray, names: Sequence[str], count: int, metric: str, columns: Sequence[str]) -> list[_Term]:
    """A metric as a sum over columns. Forgetting is linear once it is fixed after which stage a domain was best."""
    own = [j for j in range(count) if names[j] in columns]
    if metric == "general":
        own = [j for j in range(count, len(names)) if np.isfinite(u[[0, count], j]).all()]
        return [_Term(j, count, 0, 1 / len(own)) for j in own]
    if metric == "forgetting":
        own = [j for j in own if j < count - 1]
    share = 1 / len(own) if own else math.nan
    if metric == "average":
        return [_Term(j, count, None, share) for j in own]
    if metric == "learning":
        return [_Term(j, j + 1, None, share) for j in own]
    if metric != "forgetting":
        raise ValueError(f"metric is {metric!r}: give one of {METRICS}")
    best = [j + 1 + (0 if np.isnan(u[j + 1 : count, j]).any() else int(np.argmax(u[j + 1 : count, j]))) for j in own]
    return [_Term(j, count, stage, share) for j, stage in zip(own, best, strict=True)]


def _parts(
    entry: Entry, scorer: str, terms: Sequence[_Term], names: Sequence[str], sign: float, u: FloatArray, rows: RowScores
) -> Parts | None:
    parts: dict[str, FloatArray] = {}
    for term in terms:
        name = names[term.column]
        last = rows.at(entry, term.plus, scorer, name)
        first = None if term.minus is None else rows.at(entry, term.minus, scorer, name)
        if last is None or (term.minus is not None and (first is None or first[0].shape != last[0].shape)):
            return None
        weights = _weights(last, sign * u[term.plus, term.column])
        if weights is None:
            return None
        values = last[0] if first is None else last[0] - first[0]
        parts[name] = influence(sign * values, weights, share=term.share)
    return parts


def _weights(scored: _Scored, recorded: float) -> FloatArray | None:
    """The weights under which rows give the recorded mean: equal ones, or their own; `None` if neither does."""
    values, own = scored
    for weights in (np.ones_like(values), own):
        if weights.sum() > 0 and math.isclose(
            np.average(values, weights=weights), recorded, rel_tol=1e-5, abs_tol=1e-7
        ):
            return weights
    return None


def combined(samples: Mapping[float, Sequence[Sample]]) -> Sample:
    """Σ coefficient · mean of samples: a paired difference is {1: [a], -1: [b]}.

    Args:
        samples: Coefficient -> samples to average; rows are combined where all samples have the same ones.
    """
    value = math.fsum(c * s.value / len(own) for c, own in samples.items() for s in own)
    total: dict[str, FloatArray] = {}
    for coefficient, own in samples.items():
        for sample in own:
            if sample.parts is None:
                return Sample(value, None)
            for name, part in sample.parts.items():
                term = coefficient / len(own) * part
                if name in total and total[name].shape != term.shape:
                    return Sample(value, None)
                total[name] = total[name] + term if name in total else term
    return Sample(value, total)


def _by_column(frame: pl.DataFrame | None) -> dict[tuple[str, str], _Scored]:
    if frame is None or not {"column", "row", "scorer", "value", "tokens"} <= {*frame.columns}:
        return {}
    found = {}
    for (scorer, column), part in frame.sort("row").group_by("scorer", "column"):
        values = part["value"].to_numpy().astype(np.float64)
        if np.isfinite(values).all():
            # Older files have no weights, only tokens.
            weights = part["weight" if "weight" in part.columns else "tokens"]
            found[str(scorer), str(column)] = values, weights.to_numpy().astype(np.float64)
    return found
