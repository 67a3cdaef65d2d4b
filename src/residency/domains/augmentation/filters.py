"""Filters of texts that a model has written, as pure functions: what a variant must share with its parent, what not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from residency.scorers.overlap import rouge_l
from residency.scorers.translation import sacrebleu_metric

__all__ = [
    "closeness",
    "distinct_trigrams",
    "failed_filter",
    "is_refusal",
    "length_ratio",
    "likeliest_label",
    "main_script",
    "novelty",
    "numbers",
    "quotations",
]

CLOSEST, FURTHEST = 0.95, 0.3
LONGEST, SHORTEST = 2.0, 0.5
LEAST_DISTINCT = 0.6
MOST_OVERLAP = 0.7
LEAST_MARGIN = 1.0
"""Nats by which a label must be likelier than any other."""

_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
_QUOTED = re.compile(r"\"([^\"\n]+)\"|“([^”\n]+)”|«([^»\n]+)»|`([^`\n]+)`")
_SCRIPTS = (
    ("Latin", r"[A-Za-z\u00c0-\u024f]"), ("Cyrillic", r"[\u0400-\u04ff]"), ("Greek", r"[\u0370-\u03ff]"),
    ("Arabic", r"[\u0600-\u06ff]"), ("Hebrew", r"[\u0590-\u05ff]"), ("Devanagari", r"[\u0900-\u097f]"),
    ("Hangul", r"[\uac00-\ud7af]"), ("Kana", r"[\u3040-\u30ff]"), ("Han", r"[\u4e00-\u9fff]"),
)  # fmt: skip
_REFUSAL = re.compile(
    r"\b(?:as an ai\b|as a language model|i apologi[sz]e|i(?:'m| am) (?:sorry|unable|not able)|"
    r"i (?:can't|cannot|won't) (?:help|assist|provide|answer|do|fulfill|comply))",
    re.IGNORECASE,
)


def numbers(text: str) -> Counter[str]:
    """The numbers of a text as they are written, with how often each is there."""
    return Counter(_NUMBER.findall(text))


def quotations(text: str) -> Counter[str]:
    """What stands in quotation marks or backticks."""
    return Counter("".join(groups) for groups in _QUOTED.findall(text))


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    return {name: re.compile(pattern) for name, pattern in _SCRIPTS}


def main_script(text: str) -> str:
    """The script of most letters; empty for a text without any."""
    counts = {name: len(pattern.findall(text)) for name, pattern in _patterns().items()}
    # Kana makes a text Japanese, however many of its letters are Han.
    best = "Kana" if counts["Kana"] else max(counts, key=lambda name: counts[name])
    return best if counts[best] else ""


@cache
def _chrf() -> Any:
    return sacrebleu_metric("CHRF")


def closeness(child: str, parent: str) -> float:
    """chrF of a child with its parent as the reference (Popović 2015), 0 to 1."""
    return float(_chrf().sentence_score(child, [parent]).score) / 100


def length_ratio(child: str, parent: str) -> float:
    """Characters of the child per character of its parent."""
    return len(child) / max(1, len(parent))


def failed_filter(child: str, parent: str) -> str:
    """The first filter of rewordings that a text fails; empty if it passes all.

    In order: `empty`, `script`, `numbers`, `quotations`, `length` (ratio 0.5 to 2), `too_far` and `too_close` (chrF
    below 0.3, above 0.95). A text in another language of the same script is too far, as a
    rule.
    """
    if not child.strip():
        return "empty"
    equal: tuple[tuple[str, Callable[[str], object]], ...] = (
        ("script", main_script),
        ("numbers", numbers),
        ("quotations", quotations),
    )
    for name, of in equal:
        if of(child) != of(parent):
            return name
    if not SHORTEST <= length_ratio(child, parent) <= LONGEST:
        return "length"
    close = closeness(child, parent)
    return "too_far" if close < FURTHEST else "too_close" if close > CLOSEST else ""


def distinct_trigrams(text: str) -> float:
    """Distinct sequences of three words per sequence; 1 for a text of fewer words."""
    words = text.casefold().split()
    found = list(zip(words, words[1:], words[2:], strict=False))
    return len({*found}) / len(found) if found else 1.0


def novelty(text: str, seeds: Sequence[str]) -> float:
    """The largest ROUGE-L of a text with a seed (Wang et al. 2023 keep what is below 0.7)."""
    return max(rouge_l([text] * len(seeds), seeds, unicode=True), default=0.0)


def is_refusal(text: str) -> bool:
    """Whether an assistant says that it does not answer."""
    return _REFUSAL.search(text[:200]) is not None


def likeliest_label(nll: Sequence[float], labels: Sequence[str], *, margin: float = LEAST_MARGIN) -> str | None:
    """The label of the smallest negative log-likelihood; `None` if another is less than `margin` nats behind.

    Args:
        nll: Of every label, in nats.
        labels: At least two.
        margin: In nats.
    """
    order = sorted(range(len(labels)), key=lambda k: nll[k])
    return labels[order[0]] if nll[order[1]] - nll[order[0]] >= margin else None
