"""Seeds together: the arms of a study, their numbers and how far each can be trusted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from statistics import fmean, stdev
from typing import Any

from residency.metrics.discovery import printed_sign
from residency.report.records.records import Entry, Records
from residency.runs.views.tables import finite, printable, score_at

__all__ = ["Arm", "arms_of", "matrices", "mean_matrix"]

Place = tuple[tuple[str, str], ...]


@dataclass(kw_only=True)
class Arm:
    """One combination of axis values, over its seeds.

    Args:
        place: (axis, value) of every axis but the seed.
        subject: The axis whose values are compared.
        scorer: What the numbers are about.
        entries: Its cells, done or not.
    """

    place: Place
    subject: str
    scorer: str
    entries: list[Entry] = field(default_factory=list)

    @property
    def value(self) -> str:
        """Its value of the compared axis."""
        return dict(self.place).get(self.subject, " · ".join(value for _, value in self.place))

    @property
    def context(self) -> Place:
        """Where else it stands: the other axes."""
        return tuple((axis, value) for axis, value in self.place if axis != self.subject)

    @cached_property
    def name(self) -> str:
        """Its values, the compared one first."""
        return " · ".join(printable(v, 40) for v in (self.value, *(value for _, value in self.context if value)))

    @property
    def done(self) -> list[Entry]:
        """Finished cells that have the scorer."""
        return [e for e in self.entries if e.done and self.scorer in (e.record.get("scores") or {})]

    @property
    def higher_is_better(self) -> bool:
        """Direction of the scorer."""
        return bool(self.done and self.done[0].record["scores"][self.scorer]["higher_is_better"])

    @cached_property
    def by_seed(self) -> dict[Any, Entry]:
        """Seed -> finished cell."""
        return {entry.record.get("seed"): entry for entry in self.done}

    def utility(self, metric: str) -> dict[Any, float]:
        """Seed -> metric of the summary, as a utility (higher is better; a forgetting is a cost)."""
        found = {}
        for seed, entry in self.by_seed.items():
            value = finite(((entry.record.get("summary") or {}).get(self.scorer) or {}).get(metric))
            if value is not None:
                found[seed] = value
        return found

    def values(self, metric: str) -> list[float]:
        """The metric per seed in the direction it is printed: a loss reads as a loss."""
        sign = printed_sign(metric, higher_is_better=self.higher_is_better)
        return [sign * value for value in self.utility(metric).values()]

    def mean(self, metric: str) -> float | None:
        """Mean over seeds of `values`."""
        return fmean(values) if (values := self.values(metric)) else None

    def sd(self, metric: str) -> float | None:
        """Standard deviation over seeds."""
        return stdev(values) if len(values := self.values(metric)) > 1 else None

    def base(self) -> float | None:
        """Mean score of the domains before any training."""
        rows = [self._row(entry, 0) for entry in self.done]
        known = [fmean(row) for row in rows if row and None not in row]  # type: ignore[type-var, arg-type]
        return fmean(known) if known else None  # type: ignore[type-var, arg-type]

    def _row(self, entry: Entry, k: int) -> list[float | None]:
        matrix = entry.record["scores"][self.scorer]["R"]
        return [score_at(matrix, k, j) for j in range(len(entry.record["domains"]))]

    def cost(self, name: str) -> float | None:
        """Mean cost over seeds; a cost in parts is their sum."""
        found = ((e.record.get("cost") or {}).get(name) for e in self.entries if e.done)
        parts = (sum(filter(_number, c.values())) if isinstance(c, Mapping) else c for c in found)
        known = [value for c in parts if (value := finite(c)) is not None]
        return fmean(known) if known else None

    @cached_property
    def stages(self) -> list[dict[str, Any]]:
        """Mean score of every column after every stage: stage, after, column, probe, learned, score, n."""
        cells: dict[tuple[int, str], list[float]] = {}
        place: dict[tuple[int, str], dict[str, Any]] = {}
        for entry in self.done:
            domains, probes = list(entry.record["domains"]), list(entry.record.get("probes") or [])
            matrix = entry.record["scores"][self.scorer]["R"]
            for k, j in product(range(len(matrix)), range(len(domains) + len(probes))):
                column, probe = [*domains, *probes][j], j >= len(domains)
                value, key = score_at(matrix, k, j), (k, column)
                if key not in place:
                    after = "base" if k == 0 else domains[k - 1] if k <= len(domains) else f"stage {k}"
                    facts = {"stage": k, "after": after, "column": column, "probe": probe}
                    place[key] = facts | {"learned": not probe and k == j + 1}
                cells.setdefault(key, []).extend([] if value is None else [value])
        return [{**place[key], "score": fmean(v) if v else None, "n": len(v)} for key, v in cells.items()]

    def notes(self) -> list[str]:
        """What must be known before comparing."""
        notes = [f"{_cell(e)}: {printable(e.record.get('status'))}" for e in self.entries if not e.done]
        notes += [f"{_cell(e)}: not scored by {self.scorer}" for e in self.entries if e.done and e not in self.done]
        return notes + ["told the domain at test time"] * self.oracle

    @property
    def oracle(self) -> bool:
        """Whether a cell was told the domain at test time."""
        return any(bool(e.record.get("task_id_at_test")) for e in self.entries)


def _number(value: object) -> bool:
    return finite(value) is not None


def _cell(entry: Entry) -> str:
    return printable(entry.record.get("cell", "?"))


def arms_of(records: Records, scorer: str | None = None) -> list[Arm]:
    """The arms in order of appearance; references are no arms, see `residency.report.records.reference_runs`."""
    arms: dict[Place, Arm] = {}
    for entry in records.entries:
        if entry.reference is not None:
            continue
        axes = {k: v for k, v in entry.record["axes"].items() if k != "seed"}
        place = tuple((printable(k), "none" if v is None else printable(v)) for k, v in axes.items())
        new = Arm(place=place, subject=records.subject, scorer=scorer or records.scorer)
        arms.setdefault(place, new).entries.append(entry)
    return list(arms.values())


def matrices(arms: Iterable[Arm], first: str) -> list[dict[str, Any]]:
    """Score matrices averaged over seeds: name, value, columns, domains (their number), R and higher by scorer."""
    found = []
    for arm in arms:
        own = [e.record for e in arm.entries if e.done]
        own = [record for record in own if record["domains"] == own[0]["domains"]]
        if not own:
            continue
        names = sorted({name for record in own for name in record["scores"]}, key=lambda name: name != first)
        R = {name: mean_matrix([r["scores"][name]["R"] for r in own if name in r["scores"]]) for name in names}
        higher = {n: bool(next(r for r in own if n in r["scores"])["scores"][n]["higher_is_better"]) for n in names}
        columns = [printable(name) for name in (*own[0]["domains"], *(own[0].get("probes") or []))]
        facts = {"name": arm.name, "value": arm.value, "columns": columns, "domains": len(own[0]["domains"])}
        found.append(facts | {"R": R, "higher": higher})
    return found


def mean_matrix(matrices: Sequence[Sequence[Sequence[Any]]]) -> list[list[float | None]]:
    """Mean of matrices cell by cell, to 6 digits; a cell that one of them lacks is missing."""
    return [[_mean(cells) for cells in zip(*rows, strict=False)] for rows in zip(*matrices, strict=False)]


def _mean(cells: Sequence[Any]) -> float | None:
    known = [number for value in cells if (number := finite(value)) is not None]
    return float(f"{fmean(known):.6g}") if len(known) == len(cells) else None
