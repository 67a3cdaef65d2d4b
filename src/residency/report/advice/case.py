"""What a recommendation is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from residency.metrics.comparison import Comparison, compare
from residency.report.records.arms import Arm
from residency.report.records.contrasts import Contrast, paired_examples, shared_values
from residency.report.records.records import Records
from residency.runs.views.tables import AS_MUCH, printable

__all__ = ["Evidence", "ahead", "called", "listed"]

_SHOWN = 3  # names that are listed before "and n more"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a recommendation is made from: means over shared settings and seeds, in the printed direction."""

    records: Records
    arms: Sequence[Arm]
    contrasts: Sequence[Contrast]
    ranked: Sequence[str]  # values of the compared axis, best first
    means: dict[str, dict[str, float]]  # metric -> value -> mean
    tests: dict[str, Comparison]  # value -> against the baseline, in average

    @property
    def base(self) -> str:
        return self.records.baseline

    @property
    def best(self) -> str:
        return self.ranked[0]

    def of(self, value: str) -> list[Arm]:
        return [arm for arm in self.arms if arm.value == value and arm.done]

    @property
    def arm(self) -> Arm:
        return self.of(self.best)[0]

    @property
    def seeds(self) -> int:
        return min((len(arm.done) for v in self.ranked for arm in self.of(v)), default=0)

    def number(self, metric: str, value: str) -> str:
        found = self.means[metric].get(value)
        shown = list(self.means["average"].values())
        # Enough of them for what is compared to differ.
        close = max(shown) - min(shown) < 0.1
        digits = 3 if close or all(abs(v) <= 1 for m in self.means.values() for v in m.values()) else 2
        return "-" if found is None else f"{found:.{digits}f}"

    def as_much(self, own: float, other: float) -> bool:
        """Whether a difference is small beside what training gained at all."""
        start = self.arm.base()
        return abs(own - other) <= AS_MUCH * (abs(other) if start is None else abs(start - other))

    def name(self, value: str) -> str:
        return called(self.records, value)

    def ahead(self, value: str) -> bool | None:
        """Whether the best is told apart from a value, in every setting they share; `None` if nothing tells."""
        return ahead(self, value)


def ahead(case: Evidence, value: str) -> bool | None:
    """Paired over seeds if there are two, else by the examples of the contrast with the baseline."""
    table = shared_values([*case.of(case.best), *case.of(value)], "average")
    if len(table) == 2:
        found = compare(table[case.best], table[value], higher_is_better=True)
        if found.n > 1:
            return bool(found.interval.low > 0)
    if value == case.base:
        own = [c for c in case.contrasts if c.value == case.best and c.metric == "average"]
        return all(c.excludes_zero for c in own) if own and all(c.bounds for c in own) else None
    found_examples = paired_examples(case.of(case.best), case.of(value), "average")
    return None if found_examples is None else found_examples.low > 0


def called(records: Records, value: str) -> str:
    """A value of the compared axis as it reads in a sentence."""
    plain = records.subject == "mitigation" and value == "none"
    return "no mitigation" if plain else printable(value)


def listed(names: Sequence[str]) -> str:
    shown = [printable(name) for name in names[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
