"""A piece of evidence in words: the same ones on the page, on the console and in a notebook."""

from __future__ import annotations

import math

from residency.report.evidence.decision import Evidence

__all__ = ["figure", "over", "p_value", "sentence", "strength"]

_BASIS = {
    "seeds and rows": "over seeds and test rows",
    "seeds": "over seeds, on these test rows",
    "rows": "over test rows only, not over seeds",
    "none": "not known",
}


def figure(value: float) -> str:
    """A number with four digits."""
    return "-" if math.isnan(value) else f"{value:.4g}"


def p_value(p: float) -> str:
    """.05, .03125 -> .031, as p-values are printed."""
    return "-" if math.isnan(p) else "< .001" if p < 0.001 else f"{p:.2g}".removeprefix("0") if p < 1 else "1"


def over(e: Evidence) -> str:
    """What the interval speaks for."""
    words = _BASIS[e.found.basis]
    return words.replace("seeds", "orders of one seed") if e.claim.unit == "order" else words


def strength(e: Evidence) -> str:
    """How sure the word is, in a few words: what a headline puts beside it."""
    n = f"{e.found.seeds} {e.claim.unit}{'s' * (e.found.seeds != 1)}"
    rows = f" and {e.found.rows} test rows" if e.found.basis == "seeds and rows" else ""
    p = p_value(e.p)
    corrected = f"p {p if p.startswith('<') else f'= {p}'}" + (
        f", corrected for {e.family} comparisons" if e.family > 1 else ""
    )
    return {
        "better": f"shown over {n}{rows} ({corrected})",
        "worse": f"shown over {n}{rows} ({corrected})",
        "open": f"open: {n} do not tell it from chance ({corrected})",
        "too few seeds": f"none: {n} cannot be tested, 3 are the least",
        "one seed": "none: one seed says nothing about other seeds",
        "equal": f"the same on every test row ({n})",
        "missing": "none: a score is missing",
    }[e.word]


def sentence(e: Evidence, *, a: str | None = None, b: str | None = None) -> str:
    """One sentence with the numbers it rests on.

    Args:
        e: The evidence.
        a: What to call the first side; its value by default.
        b: What to call the second.
    """
    a, b, what = a or e.claim.a, b or e.claim.b, f"in {e.claim.metric} by {e.claim.scorer}"
    if e.word == "missing":
        return f"{a} and {b} cannot be compared {what}: a score is missing."
    if e.word == "equal":
        return f"{a} and {b} are equal {what}."
    side = "better" if e.estimate > 0 else "worse"
    verb = f"is {side} than" if e.shown else f"is {'ahead of' if e.estimate > 0 else 'behind'}"
    ends = sorted(math.copysign(1.0, e.estimate) * end for end in (e.found.low, e.found.high))
    spread = "" if any(map(math.isnan, ends)) else f" (95 % interval {figure(ends[0])} to {figure(ends[1])} {over(e)})"
    text = f"{a} {verb} {b} {what} by {figure(abs(e.estimate))}{spread}: {strength(e).removeprefix('none: ')}."
    if e.shown and e.smallest_p >= e.alpha:
        text += (
            f" That rests on a normal distribution of the differences: without it {e.found.seeds} {e.claim.unit}s "
            f"cannot reach p < {p_value(e.alpha)} (smallest possible p {p_value(e.smallest_p)})."
        )
    if not e.above_noise and e.estimate != 0:
        text += f" It is within the noise floor of the test rows (±{figure(e.found.noise_floor)})."
    return text
