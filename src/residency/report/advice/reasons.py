"""Why: the numbers that stand out, and the reasons point by point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from residency.report.advice.case import Evidence, listed
from residency.report.records.reference_runs import reference_rows
from residency.runs.views.tables import FLOOR, printable

__all__ = ["Fact", "against", "facts", "reasons", "size"]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One number that stands out: what it is, its value, what it is compared with, whether that is good."""

    label: str
    value: str
    against: str
    good: bool | None


def facts(case: Evidence) -> Iterator[Fact]:
    labels = {"average": "score at the end", "learning": "right after learning", "forgetting": "forgotten since"}
    # A lead that may be chance is not coloured as one.
    chance = case.best != case.base and case.ahead(case.base) is not True
    for metric, label in labels.items():
        own, other = case.means[metric].get(case.best), case.means[metric].get(case.base)
        if own is None:
            continue
        against, good = "", None
        if other is not None and case.best != case.base:
            against = f"{case.number(metric, case.base)} with {case.name(case.base)}"
            less = metric == "forgetting" or not case.arm.higher_is_better
            good = None if chance or case.as_much(own, other) else (own < other) == less
        yield Fact(label=label, value=case.number(metric, case.best), against=against, good=good)
    own_s, base_s = (_cost(case, value, "seconds") for value in (case.best, case.base))
    if own_s and base_s and case.best != case.base:
        yield Fact(label="time", value=f"{100 * (own_s / base_s - 1):+.0f} %", against=_memory(case), good=None)


def reasons(case: Evidence, tied: Sequence[str]) -> Iterator[str]:
    best, base = case.name(case.best), case.name(case.base)
    if case.best != case.base:
        yield from _keeps(case, best, base)
        yield from _learns(case, best, base)
    rest = [v for v in case.ranked[1:] if v != case.base]
    close = [v for v in tied if v != case.base]
    if close:
        names = listed(close)
        yield f"Not told apart from {best} by this evidence: {names}. If one of them costs you less, take that one."
    elif rest:
        second = f"{case.name(rest[0])} ({case.number('average', rest[0])})"
        yield f"The next best is {second}; the difference to {best} is larger than the noise of the test rows."
    yield from _traps(case)
    yield from _bound(case)


def _keeps(case: Evidence, best: str, base: str) -> Iterator[str]:
    own, other = case.means["forgetting"].get(case.best), case.means["forgetting"].get(case.base)
    if own is None or other is None:
        return
    if other > FLOOR:
        less = 100 * (other - own) / other
        kind = "less" if less >= 0 else "more"
        amount = "does not forget" if own <= FLOOR else f"forgets {abs(less):.0f} % {kind}"
        numbers = f"{case.number('forgetting', case.best)} against {case.number('forgetting', case.base)}"
        yield f"It keeps: {best} {amount} than {base} ({numbers})." if own > FLOOR else f"It keeps: {best} {amount}."


def _learns(case: Evidence, best: str, base: str) -> Iterator[str]:
    own, other = case.means["learning"].get(case.best), case.means["learning"].get(case.base)
    if own is None or other is None:
        return
    numbers = f"{case.number('learning', case.best)} against {case.number('learning', case.base)} right after a domain"
    if case.as_much(own, other):
        yield f"It learns: about as much as {base} ({numbers})."
    elif (own > other) == case.arm.higher_is_better:
        yield f"It learns: more than {base} ({numbers})."
    else:
        yield f"It pays with learning: {numbers}. The score at the end already counts that."


def _traps(case: Evidence) -> Iterator[str]:
    """Who forgets least without being best: usually who learnt least."""
    forgot, learnt = case.means["forgetting"], case.means["learning"]
    least = min(forgot, key=lambda v: forgot[v], default=None)
    if least is None or least == case.best or least not in learnt:
        return
    if forgot[least] < forgot.get(case.best, float("inf")) - FLOOR:
        yield (
            f"{case.name(least)} forgets least ({case.number('forgetting', least)}), and yet ends worse: "
            f"it had learnt less to begin with ({case.number('learning', least)} right after a domain)."
            if (learnt[least] < learnt[case.best]) == case.arm.higher_is_better
            else f"{case.name(least)} forgets least ({case.number('forgetting', least)}), and yet ends worse."
        )


def _bound(case: Evidence) -> Iterator[str]:
    """What is left to gain, if a reference tells."""
    rows = {row["kind"]: row["average"] for row in reference_rows(case.records, case.arms)}
    for kind, words in (("joint", "Trained on all domains at once"), ("independent", "Trained on each domain alone")):
        if kind in rows:
            digits = 3 if abs(rows[kind]) <= 1 else 2
            yield f"{words} the model reaches {rows[kind]:.{digits}f}; a method for streams need not beat that."
            return


def against(case: Evidence, metric: str) -> str:
    own, other = case.number(metric, case.best), case.number(metric, case.base)
    against = f" against {other} with {case.name(case.base)}" if case.base in case.means[metric] else ""
    return f"{own} {_unit(case)}{against} ({'higher' if case.arm.higher_is_better else 'lower'} is better)"


def _unit(case: Evidence) -> str:
    entry = case.arm.done[0].record["scores"][case.records.scorer]
    unit = printable(entry.get("unit") or "")
    return unit if unit.startswith("nats") else printable(case.records.scorer)


def _cost(case: Evidence, value: str, name: str) -> float | None:
    known = [c for arm in case.of(value) if (c := arm.cost(name)) is not None]
    return fmean(known) if known else None


def _memory(case: Evidence) -> str:
    state = _cost(case, case.best, "mitigation_state_bytes")
    return "" if state is None else f"extra state {size(state)}"


def size(value: float) -> str:
    """Bytes for people: 43 kB, 19.5 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"
