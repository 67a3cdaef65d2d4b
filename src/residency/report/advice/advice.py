"""What to do, why, and what the evidence does not allow: the summary of a report, in words.

The rule: take what scores best on average over all domains after the last stage, because that average is what was
learnt plus what was kept (ACC = LA + (T-1)/T · BWT holds exactly). Whoever forgets little because little was learnt
does not win by it. What cannot be told from the best one is named beside it. What was told the domain at test time is
never recommended over what was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from residency.metrics.comparison import seeds_needed
from residency.report.advice.case import Evidence, listed
from residency.report.advice.limits import limits as limits_of
from residency.report.advice.reasons import Fact, against, facts, reasons
from residency.report.records.arms import Arm
from residency.report.records.contrasts import Contrast, overall, shared_values
from residency.report.records.records import Records
from residency.runs.views.tables import FLOOR, printable

__all__ = ["Advice", "advise"]


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


def advise(records: Records, arms: Sequence[Arm], contrasts: Sequence[Contrast]) -> Advice:
    """The summary of a study or of some runs."""
    trained = list(arms)
    honest = [arm for arm in trained if not arm.oracle] or trained
    means: dict[str, dict[str, float]] = {}
    for metric in ("average", "learning", "forgetting"):
        flip = -1 if metric != "forgetting" and not _higher(honest) else 1
        means[metric] = {v: flip * fmean(own) for v, own in shared_values(honest, metric).items()}
    up = _higher(honest)
    ranked = sorted(means["average"], key=lambda v: means["average"][v], reverse=up)
    tests = {c.a: c for c in overall(honest, records.baseline)}
    limits = tuple(limits_of(records, trained, ranked))
    if not any(arm.done for arm in trained):
        return _plain("Nothing to compare yet", "no cell of this study is complete", limits)
    case = Evidence(records=records, arms=arms, contrasts=contrasts, ranked=ranked, means=means, tests=tests)
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


def _single(case: Evidence, limits: tuple[str, ...]) -> Advice:
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
        facts=tuple(facts(case)),
        reasons=(),
        limits=limits,
        choice=None,
    )


def _score(case: Evidence) -> str:
    return f"{printable(case.records.scorer)} ({'higher' if case.arm.higher_is_better else 'lower'} is better)"


def _recommend(case: Evidence, limits: tuple[str, ...]) -> Advice:
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
        lead = f"It ends best: after the last domain, on average over all domains, it is at {against(case, 'average')}."
    if forgot is not None and forgot <= FLOOR:
        lead += f" Mind that {base} does not forget here, so there was nothing to prevent."
    return Advice(
        headline=headline,
        strength=strength,
        evidence=evidence,
        lead=lead,
        facts=tuple(facts(case)),
        reasons=tuple(reasons(case, tied)),
        limits=limits,
        choice=case.best,
    )


def _strength(case: Evidence, tied: Sequence[str]) -> tuple[str, str]:
    """How sure the recommendation is, as a class and in words."""
    if case.best == case.base:
        worse = sum(c.outcome == "worse" for c in case.tests.values())
        if worse == len(case.tests):
            return "shown", f"all {worse} alternatives are shown to be worse"
        if tied:
            return "open", f"open: not told apart from {listed(tied)}"
        return "indicated", f"{worse} of {len(case.tests)} alternatives are shown to be worse, all are behind"
    test = case.tests.get(case.best)
    seeds = f"{case.seeds} seed{'s' * (case.seeds != 1)}"
    if test is not None and test.outcome == "better":
        return "shown", f"shown over {test.n} seeds (p = {test.p_adjusted:.2g})"
    if case.base in tied:
        return "open", f"open: {seeds}, and the interval of the difference includes 0"
    needed = seeds_needed(family=max(1, len(case.tests)))
    return "indicated", f"a clear lead, but {seeds}; a test needs {needed} seeds or more"
