"""What the sentences of a summary are made from: the findings, and names and numbers as they are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from residency.metrics.discovery import printed_sign
from residency.report.evidence.decision import Evidence
from residency.report.evidence.findings import Findings, Recommendation
from residency.report.records.arms import Arm
from residency.report.records.records import Records
from residency.runs.views.tables import printable

__all__ = ["Case", "called", "listed"]

_SHOWN = 3  # names that are listed before "and n more"
_METRICS = ("average", "learning", "forgetting")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Records, arms and findings, with numbers in the direction that tables print."""

    records: Records
    arms: Sequence[Arm]
    findings: Findings

    @property
    def verdict(self) -> Recommendation:
        return self.findings.recommendation

    @property
    def ranked(self) -> tuple[str, ...]:
        return self.findings.ranked

    @property
    def base(self) -> str:
        return self.findings.base or self.records.baseline

    @property
    def best(self) -> str:
        """Whom the page is about: the choice, else the leader."""
        return self.verdict.choice or self.verdict.leader or self.base

    def of(self, value: str) -> list[Arm]:
        return [arm for arm in self.arms if arm.value == value and arm.done]

    def evidence(self, metric: str = "average", scorer: str | None = None) -> Evidence | None:
        """On whom the page is about; `None` if that is the baseline itself."""
        return self.findings.of(self.best, metric, scorer)

    @cached_property
    def higher_is_better(self) -> bool:
        return self.higher(self.records.scorer)

    def higher(self, scorer: str) -> bool:
        known = (e.record["scores"].get(scorer) for arm in self.arms for e in arm.entries if e.done)
        return bool(next((k["higher_is_better"] for k in known if k is not None), True))

    @cached_property
    def means(self) -> dict[str, dict[str, float]]:
        """metric -> value -> mean, as printed."""
        found: dict[str, dict[str, float]] = {}
        for metric in _METRICS:
            levels = {v: self.printed(v, metric) for v in self.ranked}
            found[metric] = {v: level for v, level in levels.items() if level is not None}
        return found

    def printed(self, value: str, metric: str, scorer: str | None = None) -> float | None:
        """A mean in the direction that tables print."""
        scorer = scorer or self.records.scorer
        level = self.findings.level(value, metric, scorer)
        sign = -1.0 if metric == "forgetting" else printed_sign(metric, higher_is_better=self.higher(scorer))
        return None if level is None else sign * level

    def number(self, metric: str, value: str) -> str:
        found = self.means[metric].get(value)
        shown = list(self.means["average"].values())
        # Enough of them for what is compared to differ.
        close = max(shown) - min(shown) < 0.1 if shown else True
        digits = 3 if close or all(abs(v) <= 1 for m in self.means.values() for v in m.values()) else 2
        return "-" if found is None else f"{found:.{digits}f}"

    def name(self, value: str) -> str:
        return called(self.records, value)

    def cost(self, value: str, name: str) -> float | None:
        known = [c for arm in self.of(value) if (c := arm.cost(name)) is not None]
        return fmean(known) if known else None


def called(records: Records, value: str) -> str:
    """A value of the compared axis as it reads in a sentence."""
    plain = records.subject == "mitigation" and value == "none"
    return "no mitigation" if plain else printable(value)


def listed(names: Sequence[str]) -> str:
    shown = [printable(name) for name in names[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
