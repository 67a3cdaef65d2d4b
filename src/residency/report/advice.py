"""What to do, why, and what the evidence does not allow: the summary of a report, in words.

The rule: take what scores best on average over all domains after the last stage, because that average is what was
learnt plus what was kept (ACC = LA + (T-1)/T · BWT holds exactly). Whoever forgets little because little was learnt
does not win by it. What cannot be told from the best one is named beside it. What was told the domain at test time is
never recommended over what was not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from residency.metrics.comparison import Comparison, seeds_needed
from residency.report.arms import Arm
from residency.report.evidence import Contrast, overall, shared_values
from residency.report.material import Material
from residency.report.reference_runs import reference_rows
from residency.report.tables import AS_MUCH, FLOOR, finite, printable

__all__ = ["Advice", "Fact", "advise", "called", "size"]

_SHOWN = 3  # names that are listed before "and n more"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One number that stands out: what it is, its value, what it is compared with, whether that is good."""

    label: str
    value: str
    against: str
    good: bool | None


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The summary.

    Args:
        headline: What to do, in a few words.
        strength: How sure that is: `shown`, `indicated`, `open` or `none`, for colour and icon; never without words.
        evidence: The same in words.
        lead: One sentence that says why.
        facts: The numbers behind it.
        reasons: Why, point by point.
        limits: What the evidence does not allow.
        choice: The recommended value of the compared axis; `None` if there is none.
    """

    headline: str
    strength: str
    evidence: str
    lead: str
    facts: tuple[Fact, ...]
    reasons: tuple[str, ...]
    limits: tuple[str, ...]
    choice: str | None


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What a recommendation is made from: means over shared settings and seeds, in the printed direction."""

    material: Material
    arms: Sequence[Arm]
    contrasts: Sequence[Contrast]
    ranked: Sequence[str]  # values of the compared axis, best first
    means: dict[str, dict[str, float]]  # metric -> value -> mean
    tests: dict[str, Comparison]  # value -> against the baseline, in average

    @property
    def base(self) -> str:
        return self.material.baseline

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
        shown = [v for m in self.means.values() for v in m.values()]
        digits = 3 if all(abs(v) <= 1 for v in shown) else 2
        return "-" if found is None else f"{found:.{digits}f}"

    def as_much(self, own: float, other: float) -> bool:
        """Whether a difference is small beside what training gained at all."""
        start = self.arm.base()
        return abs(own - other) <= AS_MUCH * (abs(other) if start is None else abs(start - other))

    def name(self, value: str) -> str:
        return called(self.material, value)

    def ahead(self, value: str) -> bool | None:
        """Whether the best is told apart from a value, in every setting they share; `None` if nothing tells."""
        return _ahead(self, value)


def advise(material: Material, arms: Sequence[Arm], contrasts: Sequence[Contrast]) -> Advice:
    """The summary of a study or of some runs."""
    trained = [arm for arm in arms]
    honest = [arm for arm in trained if not arm.oracle] or trained
    means: dict[str, dict[str, float]] = {}
    for metric in ("average", "learning", "forgetting"):
        flip = -1 if metric != "forgetting" and not _higher(honest) else 1
        means[metric] = {v: flip * fmean(own) for v, own in shared_values(honest, metric).items()}
    up = _higher(honest)
    ranked = sorted(means["average"], key=lambda v: means["average"][v], reverse=up)
    tests = {c.a: c for c in overall(honest, material.baseline)}
    limits = tuple(_limits(material, trained, ranked, up))
    if not any(arm.done for arm in trained):
        return _plain("Nothing to compare yet", "no cell of this study is complete", limits)
    case = _Case(material=material, arms=arms, contrasts=contrasts, ranked=ranked, means=means, tests=tests)
    if not ranked:
        return _plain("No common setting to compare in", "the methods have no seed and setting in common", limits)
    if len(ranked) == 1:
        return _single(case, limits)
    return _recommend(case, limits)


def _higher(arms: Sequence[Arm]) -> bool:
    return next((arm.higher_is_better for arm in arms if arm.done), True)


def _plain(headline: str, lead: str, limits: tuple[str, ...]) -> Advice:
    lead = f"{lead[:1].upper()}{lead[1:]}."
    evidence = "no evidence"
    return Advice(
        headline=headline,
        strength="none",
        evidence=evidence,
        lead=lead,
        facts=(),
        reasons=(),
        limits=limits,
        choice=None,
    )


def _single(case: _Case, limits: tuple[str, ...]) -> Advice:
    """One method: what it learnt and lost, without a recommendation."""
    value, forgot = case.best, case.means["forgetting"].get(case.best)
    verb = "could not forget: one domain" if forgot is None else "forgets" if forgot > FLOOR else "does not forget"
    lead = (
        f"Right after each domain the average {_score(case)} is {case.number('learning', value)}; "
        f"after the last domain it is {case.number('average', value)}. There is no other method to compare with."
    )
    return Advice(
        headline=f"{case.name(value)} {verb}",
        strength="none",
        evidence="one method, nothing to compare",
        lead=lead,
        facts=tuple(_facts(case)),
        reasons=(),
        limits=limits,
        choice=None,
    )


def _bound(case: _Case) -> Iterator[str]:
    """What is left to gain, if a reference tells."""
    rows = {row["kind"]: row["average"] for row in reference_rows(case.material, case.arms)}
    for kind, words in (("joint", "Trained on all domains at once"), ("independent", "Trained on each domain alone")):
        if kind in rows:
            digits = 3 if abs(rows[kind]) <= 1 else 2
            yield f"{words} the model reaches {rows[kind]:.{digits}f}: no method for streams needs to be better than that."
            return


def _recommend(case: _Case, limits: tuple[str, ...]) -> Advice:
    best, base = case.name(case.best), case.name(case.base)
    tied = [v for v in case.ranked[1:] if case.ahead(v) is not True]
    strength, evidence = _strength(case, tied)
    forgot = case.means["forgetting"].get(case.base)
    if case.best == case.base:
        headline = f"Stay with {base}"
        lead = f"Nothing that was tried ends better than {base} on average over all domains."
    elif strength == "open" and case.base in tied:
        headline = f"No clear winner; {best} is ahead"
        lead = f"{best} ends best on average, but its lead over {base} may be chance."
    else:
        headline = f"Take {best}"
        lead = (
            f"It ends best: after the last domain, on average over all domains, it is at {_against(case, 'average')}."
        )
    if forgot is not None and forgot <= FLOOR:
        lead += f" Mind that {base} does not forget here, so there was nothing to prevent."
    return Advice(
        headline=headline,
        strength=strength,
        evidence=evidence,
        lead=lead,
        facts=tuple(_facts(case)),
        reasons=tuple(_reasons(case, tied)),
        limits=limits,
        choice=case.best,
    )


def _strength(case: _Case, tied: Sequence[str]) -> tuple[str, str]:
    """How sure the recommendation is, as a class and in words."""
    if case.best == case.base:
        rivals = [c for v, c in case.tests.items() if c.outcome == "worse"]
        few = "shown" if len(rivals) == len(case.tests) and rivals else "indicated"
        return few, f"{len(rivals)} of {len(case.tests)} alternatives are shown to be worse"
    test = case.tests.get(case.best)
    seeds = f"{case.seeds} seed{'s' * (case.seeds != 1)}"
    if test is not None and test.outcome == "better":
        return "shown", f"shown over {test.n} seeds (p = {test.p_adjusted:.2g})"
    if case.base in tied:
        return "open", f"open: {seeds}, and the interval of the difference includes 0"
    needed = seeds_needed(family=max(1, len(case.tests)))
    return "indicated", f"a clear lead, but {seeds}; a test needs {needed} seeds or more"


def _ahead(case: _Case, value: str) -> bool | None:
    """Paired over seeds if there are two, else by the examples of the contrast with the baseline."""
    table = shared_values([*case.of(case.best), *case.of(value)], "average")
    if len(table) == 2:
        from residency.metrics.comparison import compare

        found = compare(table[case.best], table[value], higher_is_better=True)
        if found.n > 1:
            return bool(found.interval.low > 0)
    if value == case.base:
        own = [c for c in case.contrasts if c.value == case.best and c.metric == "average"]
        return all(c.excludes_zero for c in own) if own and all(c.bounds for c in own) else None
    from residency.report.evidence import paired_examples

    found_examples = paired_examples(case.of(case.best), case.of(value), "average")
    return None if found_examples is None else found_examples.low > 0


def _score(case: _Case) -> str:
    return f"{printable(case.material.scorer)} ({'higher' if case.arm.higher_is_better else 'lower'} is better)"


def _against(case: _Case, metric: str) -> str:
    own, other = case.number(metric, case.best), case.number(metric, case.base)
    against = f" against {other} with {case.name(case.base)}" if case.base in case.means[metric] else ""
    return f"{own} {_unit(case)}{against} ({'higher' if case.arm.higher_is_better else 'lower'} is better)"


def _unit(case: _Case) -> str:
    entry = case.arm.done[0].record["scores"][case.material.scorer]
    unit = printable(entry.get("unit") or "")
    return unit if unit.startswith("nats") else printable(case.material.scorer)


def _facts(case: _Case) -> Iterator[Fact]:
    labels = {"average": "score at the end", "learning": "right after learning", "forgetting": "forgotten since"}
    for metric, label in labels.items():
        own, other = case.means[metric].get(case.best), case.means[metric].get(case.base)
        if own is None:
            continue
        against, good = "", None
        if other is not None and case.best != case.base:
            against = f"{case.number(metric, case.base)} with {case.name(case.base)}"
            less = metric == "forgetting" or not case.arm.higher_is_better
            good = None if case.as_much(own, other) else (own < other) == less
        yield Fact(label=label, value=case.number(metric, case.best), against=against, good=good)
    own_s, base_s = (_cost(case, value, "seconds") for value in (case.best, case.base))
    if own_s and base_s and case.best != case.base:
        yield Fact(label="time", value=f"{100 * (own_s / base_s - 1):+.0f} %", against=_memory(case), good=None)


def _cost(case: _Case, value: str, name: str) -> float | None:
    known = [c for arm in case.of(value) if (c := arm.cost(name)) is not None]
    return fmean(known) if known else None


def _memory(case: _Case) -> str:
    state = _cost(case, case.best, "mitigation_state_bytes")
    return "" if state is None else f"extra state {size(state)}"


def size(value: float) -> str:
    """Bytes for people: 43 kB, 19.5 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def _reasons(case: _Case, tied: Sequence[str]) -> Iterator[str]:
    best, base = case.name(case.best), case.name(case.base)
    if case.best != case.base:
        yield from _keeps(case, best, base)
        yield from _learns(case, best, base)
    rest = [v for v in case.ranked[1:] if v != case.base]
    close = [v for v in tied if v != case.base]
    if close:
        names = _list(close)
        yield f"Not told apart from {best} by this evidence: {names}. If one of them costs you less, take that one."
    elif rest:
        second = f"{case.name(rest[0])} ({case.number('average', rest[0])})"
        yield f"The next best is {second}; the difference to {best} is larger than the noise of the test rows."
    yield from _traps(case)
    yield from _bound(case)


def _keeps(case: _Case, best: str, base: str) -> Iterator[str]:
    own, other = case.means["forgetting"].get(case.best), case.means["forgetting"].get(case.base)
    if own is None or other is None:
        return
    if other > FLOOR:
        less = 100 * (other - own) / other
        kind = "less" if less >= 0 else "more"
        amount = "does not forget" if own <= FLOOR else f"forgets {abs(less):.0f} % {kind}"
        numbers = f"{case.number('forgetting', case.best)} against {case.number('forgetting', case.base)}"
        yield f"It keeps: {best} {amount} than {base} ({numbers})." if own > FLOOR else f"It keeps: {best} {amount}."


def _learns(case: _Case, best: str, base: str) -> Iterator[str]:
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


def _traps(case: _Case) -> Iterator[str]:
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
            else f"{case.name(least)} forgets least ({case.number('forgetting', least)}), and yet ends worse on average."
        )


def _limits(material: Material, trained: Sequence[Arm], ranked: Sequence[str], up: bool) -> Iterator[str]:
    done = [arm for arm in trained if arm.done]
    seeds = min((len(arm.done) for arm in done), default=0)
    if seeds:
        yield _seed_limit(seeds, max(1, len(ranked) - 1))
    orders = {tuple(entry.record["domains"]) for arm in done for entry in arm.done}
    if len(orders) == 1 and len(next(iter(orders))) > 1:
        yield "One order of domains: another order may rank the methods differently."
    if not any(arm.done and arm.done[0].record.get("probes") for arm in done):
        yield "No probe was scored: what happened to abilities outside these domains is not known."
    kinds = {entry.reference for entry in material.done}
    if not kinds & {"joint", "independent"} and done:
        yield "Neither joint nor single-domain training was run: how good it could get at best is not known."
    other = _other_winner(material, trained, ranked)
    if other:
        yield other
    told = [printable(arm.value) for arm in trained if arm.oracle]
    if told:
        yield f"Told the domain at test time, so it forgets little by construction: {_list(told)}."
    missing = [entry for entry in material.entries if not entry.done]
    if missing:
        names = _list([f"{printable(e.record['cell'])} ({printable(e.record['status'])})" for e in missing])
        yield f"{len(missing)} of {len(material.entries)} cells are not in these numbers: {names}."
    yield from _warnings(material, done, ranked)
    gaps = sorted({printable(arm.name) for arm in done for e in arm.done if _gaps(e.record, material.scorer)})
    if gaps:
        yield f"Scores are missing inside the matrices of {_list(gaps)}; numbers that need them are left out."


def _warnings(material: Material, done: Sequence[Arm], ranked: Sequence[str]) -> Iterator[str]:
    """What the record of the best one says must be read beside its scores."""
    for arm in done:
        if ranked and arm.value == ranked[0]:
            texts = (arm.done[0].record.get("warnings") or {}).get(material.scorer) or []
            yield from (f"{printable(arm.name)}: {printable(text, 300)}" for text in texts)


def _gaps(record: object, scorer: str) -> bool:
    matrix = record["scores"][scorer]["R"]  # type: ignore[index]
    return any(finite(value) is None for row in matrix for value in row)


def _seed_limit(seeds: int, family: int) -> str:
    needed = seeds_needed(family=family)
    if seeds == 1:
        return (
            "One seed: no statement about significance. Intervals show the noise of the test rows only; "
            f"another seed may shift every number. {needed} seeds could show a difference."
        )
    if seeds < needed:
        compared = f" in {family} comparisons" if family > 1 else ""
        return f"{seeds} seeds cannot reach p < .05{compared} without assuming a distribution; {needed} seeds could."
    return f"{seeds} seeds; p-values are corrected for {family} comparison{'s' * (family != 1)} (Holm)."


def _other_winner(material: Material, trained: Sequence[Arm], ranked: Sequence[str]) -> str:
    """Whether another scorer would choose differently."""
    names = {name for arm in trained for e in arm.done for name in e.record["scores"]} - {material.scorer}
    said = []
    for name in sorted(names):
        arms = [Arm(place=a.place, subject=a.subject, scorer=name, entries=a.entries) for a in trained]
        table = shared_values([arm for arm in arms if not arm.oracle], "average")
        if len(table) > 1 and ranked:
            best = max(table, key=lambda v: fmean(table[v]))
            if best != ranked[0]:
                said.append(f"by {printable(name)} {printable(best)} would be best")
    return f"Scores disagree: {'; '.join(said)}." if said else ""


def called(material: Material, value: str) -> str:
    """A value of the compared axis as it reads in a sentence."""
    plain = material.subject == "mitigation" and value == "none"
    return "no mitigation" if plain else printable(value)


def _list(names: Sequence[str]) -> str:
    shown = [printable(name) for name in names[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
