"""What to do, why, and what the evidence does not allow: the summary of a report, in words.

The rule: take what scores best on average over all domains after the last stage, because that average is what was
learnt plus what was kept (ACC = LA + (T-1)/T · BWT holds exactly), and only if the evidence shows that it is better
than the baseline. Whoever forgets little because little was learnt does not win by it. What was told the domain at test
time is never recommended over what was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from residency.report.advice.case import Case, listed
from residency.report.advice.limits import limits as limits_of
from residency.report.advice.reasons import Fact, against, facts, reasons
from residency.report.evidence.findings import Findings
from residency.report.evidence.wording import strength
from residency.report.records.arms import Arm
from residency.report.records.records import Records
from residency.runs.views.tables import FLOOR, printable

__all__ = ["Advice", "advise"]


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The summary.

    Args:
        headline: What to do, in a few words.
        strength: How sure that is: `shown`, `open` or `none`, for colour and icon; never without words.
        evidence: The same in words.
        lead: One sentence that says why.
        facts: The numbers behind it.
        reasons: Why, point by point.
        limits: What the evidence does not allow.
        choice: The recommended value of the compared axis; `None` where no difference is shown.
        leader: Whom the page is about, recommended or not; `None` if there is nobody.
    """

    headline: str
    strength: str
    evidence: str
    lead: str
    facts: tuple[Fact, ...] = ()
    reasons: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    choice: str | None = None
    leader: str | None = None


def advise(records: Records, arms: Sequence[Arm], findings: Findings) -> Advice:
    """The summary of a study or of some runs."""
    case = Case(records=records, arms=arms, findings=findings)
    limits = tuple(limits_of(case))
    if not any(arm.done for arm in arms):
        return _plain("Nothing to compare yet", "No cell of this study is complete.", limits)
    if not case.means["average"]:
        return _plain("No common setting to compare in", "No method has a score after every stage.", limits)
    if not findings.study.same_tokens(records.scorer):
        lead = "The same rows are different numbers of tokens to these models: nats per token rank their tokenizers."
        return _plain(f"{printable(records.scorer)} ranks nobody here", lead, limits)
    if len(case.ranked) == 1:
        return _single(case, limits)
    return _recommend(case, limits)


def _plain(headline: str, lead: str, limits: tuple[str, ...]) -> Advice:
    return Advice(headline=headline, strength="none", evidence="no evidence", lead=lead, limits=limits)


def _single(case: Case, limits: tuple[str, ...]) -> Advice:
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
        limits=limits,
        leader=value,
    )


def _score(case: Case) -> str:
    return f"{printable(case.records.scorer)} ({'higher' if case.higher_is_better else 'lower'} is better)"


def _recommend(case: Case, limits: tuple[str, ...]) -> Advice:
    verdict, base = case.verdict, case.name(case.base)
    best, forgot = case.name(case.best), case.means["forgetting"].get(case.base)
    if case.best == case.base:
        headline, lead = (
            f"Stay with {base}",
            f"Nothing that was tried ends better than {base} on average over all domains.",
        )
    elif verdict.choice is not None:
        headline = f"Take {best}"
        lead = f"It ends best: after the last domain, on average over all domains, it is at {against(case, 'average')}."
    else:
        headline = f"No clear winner; {best} is ahead"
        lead = f"{best} ends best on average, at {against(case, 'average')}, but its lead over {base} is not shown."
    if verdict.disagreeing and case.best != case.base:
        verb = "disagrees" if len(verdict.disagreeing) == 1 else "disagree"
        headline += f", but {listed(verdict.disagreeing)} {verb}"
        lead += (
            f" That is by {printable(case.records.scorer)}; by {listed(verdict.disagreeing)} it does not end better."
        )
    if forgot is not None and forgot <= FLOOR:
        lead += f" Mind that {base} does not forget here, so there was nothing to prevent."
    return Advice(
        headline=headline,
        strength=verdict.strength,
        evidence=_evidence(case),
        lead=lead,
        facts=tuple(facts(case)),
        reasons=tuple(reasons(case)),
        limits=limits,
        choice=verdict.choice,
        leader=case.best,
    )


def _evidence(case: Case) -> str:
    """How sure the recommendation is, in words."""
    found = case.evidence()
    if found is not None:
        return strength(found)
    known = {v: e for v in case.ranked if (e := case.findings.of(v)) is not None}
    worse = sum(e.word == "worse" for e in known.values())
    if case.verdict.strength == "shown":
        return f"all {worse} alternatives are shown to be worse"
    if case.verdict.strength == "none":
        return strength(next(iter(known.values())))
    rest = [v for v, e in known.items() if e.word != "worse"]
    return f"open: {worse} of {len(known)} alternatives are shown to be worse; not told apart: {listed(rest)}"
