"""All evidence of one page, and what follows from it: what to take, what ties with it, which scores disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Literal

from residency.report.evidence.decision import ALPHA, Evidence, decide
from residency.report.evidence.effects import Factorial, claims
from residency.report.evidence.samples import columns_with

__all__ = ["Findings", "Recommendation", "Strength", "task_scorers"]

Strength = Literal["shown", "open", "none"]
# What adapters report about themselves; nobody chooses a method by it.
_DIAGNOSTIC = ("nll_routed", "nll_newest", "routing_error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """What to do about the compared axis.

    Args:
        choice: The value to take: shown to be better than the baseline, or the baseline itself where no alternative
            ends better; `None` where nothing is shown.
        leader: The value with the best estimate, shown or not; `None` if nothing can be compared.
        strength: `shown`, `open` (compared and not shown), `none` (nothing to compare, or one seed).
        ties: Alternatives that are not told apart from the choice, or from the leader.
        disagreeing: Scorers by which the leader does not end better than the baseline.
    """

    choice: str | None
    leader: str | None
    strength: Strength
    ties: tuple[str, ...]
    disagreeing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The evidence of one page; every screen prints it and computes none.

    Args:
        study: The finished cells.
        subject: The axis whose values are chosen from.
        scorer: What the page is about.
        tasks: The other scorers.
        excluded: Values that are never recommended (told the domain at test time).
        alpha: Level of the page.
    """

    study: Factorial
    subject: str
    scorer: str
    tasks: tuple[str, ...] = ()
    excluded: frozenset[str] = frozenset()
    alpha: float = ALPHA

    @cached_property
    def evidence(self) -> tuple[Evidence, ...]:
        """Every comparison of the page, judged as one family."""
        if not self.study.entries:
            return ()
        wanted = claims(self.study, subject=self.subject, scorer=self.scorer, others=self.tasks)
        return tuple(decide(list(wanted), alpha=self.alpha))

    @property
    def base(self) -> str | None:
        """The baseline of the compared axis."""
        return self.study.baseline(self.subject) if self.subject in self.study.axes else None

    def of(self, value: str, metric: str = "average", scorer: str | None = None) -> Evidence | None:
        """The evidence on a value of the compared axis."""
        return self._by_value.get((self.subject, value, metric, scorer or self.scorer))

    @cached_property
    def _by_value(self) -> dict[tuple[str, str, str, str], Evidence]:
        return {(e.claim.axis, e.claim.a, e.claim.metric, e.claim.scorer): e for e in self.evidence}

    def along(self, axis: str) -> list[Evidence]:
        """The evidence on an axis, or on an interaction (`a × b`)."""
        return [e for e in self.evidence if e.claim.axis == axis]

    def mean_before(self, scorer: str) -> float | None:
        """Mean score before training over the columns of `level`, as a utility."""
        found = []
        base = self.base
        for entry in self.study.blocks({self.subject: base}).values() if base is not None else ():
            known = (entry.record.get("scores") or {}).get(scorer)
            columns = columns_with([entry], scorer)
            names = entry.record["domains"]
            if known is not None and columns:
                row = [known["R"][0][names.index(column)] for column in columns]
                if None not in row:
                    found.append((1 if known["higher_is_better"] else -1) * fmean(row))
        return fmean(found) if found else None

    def columns(self, scorer: str) -> tuple[str, ...]:
        """Domains over which the baseline's cells have this scorer, in learning order."""
        base = self.base
        return columns_with(list(self.study.blocks({self.subject: base}).values()), scorer) if base is not None else ()

    def level(self, value: str, metric: str, scorer: str | None = None) -> float | None:
        """A value's mean as a utility, on the settings and seeds of the baseline: missing cells shift no comparison."""
        scorer, base = scorer or self.scorer, self.base
        if base is None:
            return None
        entries = list(self.study.blocks({self.subject: base}).values())
        columns = columns_with(entries, scorer)
        found = self.of(value, metric, scorer)
        columns = found.claim.columns if found is not None else columns
        samples = [self.study.sample(entry, scorer, metric, columns) for entry in entries]
        known = [sample.value for sample in samples if sample is not None]
        if not known or (value != base and found is None):
            return None
        return fmean(known) + (found.estimate if found is not None else 0.0)

    @cached_property
    def ranked(self) -> tuple[str, ...]:
        """Values that may be recommended, the best estimate first; the baseline is among them."""
        if self.base is None:
            return ()
        found = {
            v: e.estimate for v in self.study.axes[self.subject] if (e := self.of(v)) is not None and e.found.seeds
        }
        found |= {self.base: 0.0}
        eligible = (v for v in found if v not in self.excluded)
        return tuple(sorted(eligible, key=lambda v: (-found[v], v != self.base)))

    @cached_property
    def recommendation(self) -> Recommendation:
        """What to do."""
        if not self.ranked or len(self.ranked) < 2:
            leader = self.ranked[0] if self.ranked else None
            return Recommendation(choice=None, leader=leader, strength="none", ties=(), disagreeing=())
        known = {v: self.of(v) for v in self.ranked}
        words = {v: e.word for v, e in known.items() if e is not None}
        better = [v for v in self.ranked if words.get(v) == "better"]
        leader = better[0] if better else self.ranked[0]
        if better:
            choice, strength = better[0], "shown"
        elif leader == self.base:
            choice, strength = self.base, "shown" if {*words.values()} == {"worse"} else "open"
        else:
            choice, strength = None, "open"
        if not better and {*words.values()} <= {"one seed", "missing"}:
            strength = "none"
        return Recommendation(
            choice=choice,
            leader=leader,
            strength=strength,  # type: ignore[arg-type]
            ties=self._ties(leader),
            disagreeing=self._disagreeing(leader),
        )

    def _ties(self, leader: str) -> tuple[str, ...]:
        """Values that the leader is not shown to beat, judged as a family of their own: nothing is claimed of them."""
        rest = [v for v in self.ranked if v != leader]
        pairs = [self.study.main_effect(self.subject, leader, "average", self.scorer, against=v) for v in rest]
        judged = decide(pairs, alpha=self.alpha)
        return tuple(v for v, e in zip(rest, judged, strict=True) if e.word != "better")

    def _disagreeing(self, leader: str) -> tuple[str, ...]:
        found: Mapping[str, Evidence | None] = {s: self.of(leader, "average", s) for s in self.tasks}
        return tuple(s for s, e in found.items() if e is not None and (e.word == "worse" or e.estimate < 0))


def task_scorers(names: Sequence[str], scorer: str) -> tuple[str, ...]:
    """The other scorers that say how well a task is done."""
    return tuple(name for name in dict.fromkeys(names) if name != scorer and name not in _DIAGNOSTIC)
