"""Why: the numbers that stand out, and the reasons point by point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from residency.report.advice.case import Case, listed
from residency.report.evidence.decision import Evidence
from residency.report.evidence.wording import figure
from residency.report.records.reference_runs import reference_rows
from residency.runs.views.tables import FLOOR, printable

__all__ = ["Fact", "against", "facts", "reasons", "size"]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One number that stands out: what it is, its value, what it is compared with, whether that is shown to be good."""

    label: str
    value: str
    against: str
    good: bool | None


def facts(case: Case) -> Iterator[Fact]:
    """The three metrics and the time of whom the page is about; coloured by the word of their evidence."""
    labels = {"average": "score at the end", "learning": "right after learning", "forgetting": "forgotten since"}
    for metric, label in labels.items():
        if case.best not in case.means[metric]:
            continue
        found, against, good = case.evidence(metric), "", None
        if found is not None:
            against = f"{case.number(metric, case.base)} with {case.name(case.base)}"
            good = found.word == "better" if found.shown else None
        yield Fact(label=label, value=case.number(metric, case.best), against=against, good=good)
    own_s, base_s = (case.cost(value, "seconds") for value in (case.best, case.base))
    if own_s and base_s and case.best != case.base:
        yield Fact(label="time", value=f"{100 * (own_s / base_s - 1):+.0f} %", against=_memory(case), good=None)


def reasons(case: Case) -> Iterator[str]:
    """What the evidence says about forgetting, learning, the other scores and the other methods."""
    best = case.name(case.best)
    if case.best != case.base:
        yield from _metric(case, "forgetting", {"better": "It keeps", "worse": "It forgets"})
        yield from _metric(case, "learning", {"better": "It learns more", "worse": "It pays with learning"})
        yield from _tasks(case)
    close = [v for v in case.verdict.ties if v != case.base]
    if close and case.verdict.choice is not None:
        names = listed([case.name(v) for v in close])
        yield f"Not told apart from {best} by this evidence: {names}. If one of them costs you less, take that one."
    yield from _axes(case)
    yield from _traps(case)
    yield from _bound(case)


def _metric(case: Case, metric: str, starts: dict[str, str]) -> Iterator[str]:
    found = case.evidence(metric)
    if found is None or found.word in ("missing", "equal"):
        return
    own, other = case.number(metric, case.best), case.number(metric, case.base)
    noun = "forgetting" if metric == "forgetting" else "right after a domain"
    if found.shown:
        yield f"{starts[found.word]}: {noun} {own} against {other}{_less(case, metric)} ({_ends(found)})."
    else:
        yield f"{noun[:1].upper()}{noun[1:]}: {own} against {other}; a difference is not shown ({_ends(found)})."


def _less(case: Case, metric: str) -> str:
    own, other = case.means[metric].get(case.best), case.means[metric].get(case.base)
    if metric != "forgetting" or own is None or other is None or other <= FLOOR:
        return ""
    share = 100 * (other - own) / other
    return f", {abs(share):.0f} % {'less' if share >= 0 else 'more'}"


def _ends(found: Evidence) -> str:
    if found.found.basis == "none":
        return "one seed, no interval"
    only = ", of the test rows only" if found.found.basis == "rows" else ""
    side, sign = ("better", 1) if found.estimate >= 0 else ("worse", -1)
    low, high = sorted((sign * found.found.low, sign * found.found.high))
    return f"{side} by {figure(abs(found.estimate))}, 95 % interval {figure(low)} to {figure(high)}{only}"


def _tasks(case: Case) -> Iterator[str]:
    """What the other scores say about whom the page is about."""
    words: dict[str, list[str]] = {}
    for scorer in case.findings.tasks:
        found = case.evidence("average", scorer)
        if found is not None and found.word != "missing":
            words.setdefault("better" if found.shown and found.estimate > 0 else found.word, []).append(scorer)
    for word, scorers in words.items():
        said = {"better": "the same is shown", "worse": "the opposite is shown", "equal": "all rows are equal"}
        yield f"By {listed(scorers)}: {said.get(word, 'no difference is shown')}."


def _axes(case: Case) -> Iterator[str]:
    """Effects along the other axes that are shown."""
    for e in case.findings.evidence:
        if e.claim.axis != case.findings.subject and e.claim.metric == "average" and e.shown:
            side = "better" if e.estimate > 0 else "worse"
            axis, a, b = (printable(name) for name in (e.claim.axis, e.claim.a, e.claim.b))
            yield f"{axis}: {a} ends {side} than {b} by {figure(abs(e.estimate))}."


def _traps(case: Case) -> Iterator[str]:
    """Who forgets least without being best: usually who learnt least."""
    forgot, learnt = case.means["forgetting"], case.means["learning"]
    least = min(forgot, key=lambda v: forgot[v], default=None)
    if least is None or least == case.best or least not in learnt:
        return
    if forgot[least] < forgot.get(case.best, float("inf")) - FLOOR:
        yield (
            f"{case.name(least)} forgets least ({case.number('forgetting', least)}), and yet ends worse: "
            f"it had learnt less to begin with ({case.number('learning', least)} right after a domain)."
            if (learnt[least] < learnt[case.best]) == case.higher_is_better
            else f"{case.name(least)} forgets least ({case.number('forgetting', least)}), and yet ends worse."
        )


def _bound(case: Case) -> Iterator[str]:
    """What is left to gain, if a reference tells."""
    rows = {row["kind"]: row["average"] for row in reference_rows(case.records, case.arms)}
    for kind, words in (("joint", "Trained on all domains at once"), ("independent", "Trained on each domain alone")):
        if kind in rows:
            digits = 3 if abs(rows[kind]) <= 1 else 2
            yield f"{words} the model reaches {rows[kind]:.{digits}f}; a method for streams need not beat that."
            return


def against(case: Case, metric: str) -> str:
    """`0.25 nats against 0.31 with no mitigation (lower is better)`."""
    own, other = case.number(metric, case.best), case.number(metric, case.base)
    against = f" against {other} with {case.name(case.base)}" if case.base in case.means[metric] else ""
    return f"{own} {_unit(case)}{against} ({'higher' if case.higher_is_better else 'lower'} is better)"


def _unit(case: Case) -> str:
    entry = case.of(case.best)[0].done[0].record["scores"][case.records.scorer]
    unit = printable(entry.get("unit") or "")
    return unit if unit.startswith("nats") else printable(case.records.scorer)


def _memory(case: Case) -> str:
    state = case.cost(case.best, "mitigation_state_bytes")
    return "" if state is None else f"extra state {size(state)}"


def size(value: float) -> str:
    """Bytes for people: 43 kB, 19.5 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"
