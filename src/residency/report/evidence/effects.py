"""What a study can claim: every value of every axis against that axis's baseline, and first interactions.

A contrast is paired: for each seed the mean difference over all settings of the other axes in which both values were
run with that seed. Seeds are the units, orders of domains are pooled inside them; with one seed in several orders the
orders are the units. In a complete factorial the contrasts are the treatment coefficients of the least-squares model
with main effects, the interactions those of the model with two-way terms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import numpy as np

from residency.core.text import printable
from residency.report.evidence.decision import Claim
from residency.report.evidence.samples import RowScores, Sample, columns_with, combined, sample_of
from residency.report.records.records import Entry

__all__ = ["TIMES", "Factorial", "axis_baseline", "claims"]

ORDER = "order"
TIMES = " \N{MULTIPLICATION SIGN} "  # between the names of two axes
_MOST_INTERACTIONS = 40
Key = tuple[tuple[str, str], ...]


@dataclass(kw_only=True)
class Factorial:
    """The finished cells of a study by their place on its axes.

    Args:
        entries: Finished cells of the axes (no references).
        baselines: Axis -> the value that others are compared with; `none` or the first one elsewhere.
    """

    entries: Sequence[Entry]
    baselines: Mapping[str, str] = field(default_factory=dict)
    rows: RowScores = field(default_factory=RowScores)

    def __post_init__(self) -> None:
        self._same_tokens: dict[str, bool] = {}
        self._samples: dict[tuple[int, str, str, tuple[str, ...]], Sample | None] = {}
        self.cells: dict[Key, dict[str, Entry]] = {}
        for entry in self.entries:
            place = {printable(k): "none" if v is None else printable(v) for k, v in entry.record["axes"].items()}
            place.pop("seed", None)
            self.cells.setdefault(tuple(place.items()), {})[str(entry.record.get("seed"))] = entry
        self.axes: dict[str, list[str]] = {}
        for key in self.cells:
            for axis, value in key:
                values = self.axes.setdefault(axis, [])
                values += [value] * (value not in values)
        seeds = {seed for own in self.cells.values() for seed in own}
        self.by_order = len(seeds) == 1 and len(self.axes.get(ORDER, ())) > 1

    @property
    def varied(self) -> list[str]:
        """Axes with more than one value."""
        return [axis for axis, values in self.axes.items() if len(values) > 1]

    def baseline(self, axis: str) -> str:
        """The value that others of the axis are compared with."""
        return axis_baseline(self.axes[axis], self.baselines.get(axis))

    def blocks(self, fixed: Mapping[str, str]) -> dict[tuple[Key, str], Entry]:
        """(setting of the other axes, seed) -> the cell there."""
        found: dict[tuple[Key, str], Entry] = {}
        for key, own in self.cells.items():
            place = dict(key)
            if all(place.get(axis) == value for axis, value in fixed.items()):
                rest = tuple((axis, value) for axis, value in key if axis not in fixed)
                found |= {(rest, seed): entry for seed, entry in own.items()}
        return found

    def same_tokens(self, scorer: str) -> bool:
        """Whether a score per token counts the same tokens everywhere; of other scores, and of unknown rows, `True`."""
        if scorer not in self._same_tokens:
            self._same_tokens[scorer] = not self._per_token(scorer) or all(self._alike_tokens(scorer))
        return self._same_tokens[scorer]

    def _per_token(self, scorer: str) -> bool:
        known = (entry.record["scores"].get(scorer) for entry in self.entries)
        return any(" token" in str(k.get("unit")) for k in known if k is not None)

    def _alike_tokens(self, scorer: str) -> Iterator[bool]:
        first: dict[str, Any] = {}
        for entry in self.entries:
            for column in columns_with([entry], scorer):
                scored = self.rows.at(entry, len(entry.record["domains"]), scorer, column)
                if scored is not None:
                    yield np.array_equal(first.setdefault(column, scored[1]), scored[1])

    def sample(self, entry: Entry, scorer: str, metric: str, columns: tuple[str, ...]) -> Sample | None:
        """A metric of one cell, computed once."""
        key = (id(entry), scorer, metric, columns)
        if key not in self._samples:
            self._samples[key] = sample_of(entry, scorer, metric, columns, self.rows)
        return self._samples[key]

    def claim(
        self,
        coefficients: Mapping[float, Sequence[Mapping[str, str]]],
        names: Mapping[str, str],
        metric: str,
        scorer: str,
    ) -> Claim:
        """A contrast: Σ coefficient · sum of the cells at the given places, paired over everything else."""
        places = [(c, place) for c, own in coefficients.items() for place in own]
        blocks = [(c, self.blocks(place)) for c, place in places]
        shared = [block for block in blocks[0][1] if all(block in own for _, own in blocks)]
        if not self.same_tokens(scorer):
            shared = []
        used = [own[block] for _, own in blocks for block in shared]
        columns = columns_with(used, scorer)
        by_order = self.by_order and not any(ORDER in place for _, place in places)
        units: dict[str, list[Sample]] = {}
        settings = set()
        for block in shared:
            samples = [(c, self.sample(own[block], scorer, metric, columns)) for c, own in blocks]
            if all(sample is not None for _, sample in samples):
                unit = dict(block[0]).get(ORDER, "") if by_order else block[1]
                units.setdefault(unit, []).append(_contrast([(c, s) for c, s in samples if s is not None]))
                settings.add(block[0])
        pooled = [combined({1.0: own}) for own in units.values()]
        parts = tuple(s.parts for s in pooled if s.parts is not None)
        return Claim(
            **names,
            metric=metric,
            scorer=scorer,
            columns=columns,
            settings=len(settings),
            scores=tuple(s.value for s in pooled),
            parts=parts if pooled and len(parts) == len(pooled) and _alike(parts) else None,
            unit="order" if by_order else "seed",
        )

    def main_effect(self, axis: str, value: str, metric: str, scorer: str, *, against: str | None = None) -> Claim:
        """A value of an axis against its baseline, over all settings of the other axes."""
        base = self.baseline(axis) if against is None else against
        names = {"axis": axis, "a": value, "b": base}
        return self.claim({1.0: [{axis: value}], -1.0: [{axis: base}]}, names, metric, scorer)

    def interaction(self, one: tuple[str, str], two: tuple[str, str], metric: str, scorer: str) -> Claim:
        """How much more a value of one axis gains beside a value of another than beside that one's baseline."""
        (p, x), (q, y) = one, two
        x0, y0 = self.baseline(p), self.baseline(q)
        names = {"axis": f"{p}{TIMES}{q}", "a": f"{x} with {y}", "b": f"{x} with {y0}"}
        both, neither = [{p: x, q: y}, {p: x0, q: y0}], [{p: x0, q: y}, {p: x, q: y0}]
        return self.claim({1.0: both, -1.0: neither}, names, metric, scorer)


def _contrast(samples: Sequence[tuple[float, Sample]]) -> Sample:
    grouped: dict[float, list[Sample]] = {}
    for coefficient, sample in samples:
        grouped.setdefault(coefficient, []).append(sample)
    return combined({c * len(own): own for c, own in grouped.items()})


def _alike(parts: Sequence[Any]) -> bool:
    """Whether all seeds were scored on the same rows."""
    sizes: dict[str, int] = {}
    return all(sizes.setdefault(name, part.size) == part.size for own in parts for name, part in own.items())


def axis_baseline(values: Sequence[str], wanted: str | None = None) -> str:
    """The wanted value if it is there, else `none`, else the first one."""
    return wanted if wanted is not None and wanted in values else "none" if "none" in values else values[0]


def claims(study: Factorial, *, subject: str, scorer: str, others: Sequence[str] = ()) -> Iterator[Claim]:
    """Everything that a page compares, in reading order.

    Args:
        study: The finished cells.
        subject: The axis whose values are to be chosen from: all metrics, and all scorers.
        scorer: What the page is about.
        others: Further scorers (task scores), averaged over the domains that have them.
    """
    probes = any(entry.record.get("probes") for entry in study.entries)
    for axis in sorted(study.varied, key=lambda axis: axis != subject):
        metrics: tuple[Literal["average", "learning", "forgetting", "general"], ...]
        metrics = ("average", "learning", "forgetting") if axis == subject else ("average", "forgetting")
        for value in study.axes[axis]:
            if value != study.baseline(axis):
                yield from (study.main_effect(axis, value, metric, scorer) for metric in metrics)
                if axis == subject:
                    yield from (study.main_effect(axis, value, "average", other) for other in others)
                    yield from (study.main_effect(axis, value, "general", s) for s in (scorer, *others) if probes)
    yield from _interactions(study, subject, scorer)


def _interactions(study: Factorial, subject: str, scorer: str) -> Iterator[Claim]:
    pairs = list(combinations(sorted(study.varied, key=lambda axis: axis != subject), 2))
    values = {axis: [v for v in study.axes[axis] if v != study.baseline(axis)] for axis in study.varied}
    if sum(len(values[p]) * len(values[q]) for p, q in pairs) > _MOST_INTERACTIONS:
        # A table of hundreds of interactions is read by nobody, and would take the power from everything else.
        pairs = []
    for p, q in pairs:
        for x in values[p]:
            yield from (study.interaction((p, x), (q, y), "average", scorer) for y in values[q])
