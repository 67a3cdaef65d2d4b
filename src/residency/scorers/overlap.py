"""Scores of overlapping words: F1 and ROUGE."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from residency.core.errors import UserError
from residency.core.types import Row
from residency.scorers.base import Answer, ScoreInfo, Scorer, references

__all__ = ["F1", "Rouge", "needs_blanks", "rouge_l", "squad_tokens", "word_f1"]


def squad_tokens(text: str) -> list[str]:
    """Words as SQuAD's evaluation compares them: lower case, no punctuation, no articles (Rajpurkar et al. 2016)."""
    plain = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def word_f1(answer: str, reference: str) -> float:
    """F1 of the bags of words.

    >>> round(word_f1("the the cat", "the cat sat"), 3)
    0.667
    """
    written, wanted = squad_tokens(answer), squad_tokens(reference)
    if not written or not wanted:
        return float(written == wanted)
    both = (Counter(written) & Counter(wanted)).total()
    return 2 * both / (len(written) + len(wanted))


@dataclass(frozen=True, kw_only=True)
class F1(Scorer):
    """F1 of the answer's words against the completion's, normalised as SQuAD does; the best of several references."""

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"f1": {}}
    unit: ClassVar[str] = "F1 of words, 0 to 1"
    needs: ClassVar[Literal["generation"]] = "generation"

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 to 1."""
        return [max(word_f1(a.text or "", r) for r in references(row)) for row, a in zip(rows, answers, strict=True)]

    def check(self, rows: Sequence[Row]) -> None:
        """Words are separated by blanks."""
        needs_blanks(rows, "f1")


def rouge_l(predictions: Sequence[str], targets: Sequence[str], *, unicode: bool = False) -> list[float]:
    """ROUGE-L F1 of each pair (Lin 2004), by torchmetrics; of words of any script if `unicode`."""
    variant = "rougeL_unicode" if unicode else "rougeL"
    return [_rouge(p, t, variant, False) for p, t in zip(predictions, targets, strict=True)]


def _rouge(prediction: str, target: str, variant: str, stemmer: bool) -> float:
    from torchmetrics.functional.text.rouge import rouge_score

    key: Any = variant.removesuffix("_unicode")
    options: dict[str, Any] = {"rouge_keys": key, "use_stemmer": stemmer}
    if variant.endswith("_unicode"):
        options |= {"tokenizer": _unicode_tokens, "normalizer": str.lower}
    found = rouge_score(prediction, target, **options)
    return float(torch.as_tensor(found[f"{key}_fmeasure"]))


def _unicode_tokens(text: str) -> list[str]:
    """Words of any script; of scripts without blanks every character."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text)


@dataclass(frozen=True, kw_only=True)
class Rouge(Scorer):
    """ROUGE F1 (Lin 2004) of the answer against the completion; the best of several references.

    Tokens are `[a-z0-9]+` after lower-casing, as in Google's `rouge_score`: texts in other scripts score 0, so that a
    domain of them is refused; `_unicode` takes words of any script, and single characters where there are no blanks.

    Args:
        variant: `rougeL` (longest common subsequence), `rouge1`, `rouge2` (n-grams), or `rougeL_unicode`.
        stemmer: Porter's; the tables of O-LoRA, SAPT and SuperNI have it on.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "rougeL": {"variant": "rougeL"},
        "rouge1": {"variant": "rouge1"},
        "rouge2": {"variant": "rouge2"},
        "rougeL_unicode": {"variant": "rougeL_unicode"},
        "rougeL_stemmed": {"variant": "rougeL", "stemmer": True},
    }
    unit: ClassVar[str] = "ROUGE F1, 0 to 1"
    needs: ClassVar[Literal["generation"]] = "generation"
    libraries: ClassVar[tuple[str, ...]] = ("torchmetrics",)

    variant: Literal["rougeL", "rouge1", "rouge2", "rougeL_unicode"] = "rougeL"
    stemmer: bool = False

    def info(self) -> ScoreInfo:
        """Named after the variant."""
        return ScoreInfo(higher_is_better=True, unit=f"ROUGE-{self.variant[5]} F1, 0 to 1")

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 to 1."""
        return [
            max(_rouge(answer.text or "", text, self.variant, self.stemmer) for text in references(row))
            for row, answer in zip(rows, answers, strict=True)
        ]

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse texts that it would silently score 0.

        Raises:
            UserError: Most completions have no Latin letter and no digit.
        """
        silent = [row for row in rows if not re.search(r"[a-zA-Z0-9]", row.completion)]
        if not self.variant.endswith("_unicode") and len(silent) * 2 > len(rows):
            raise UserError(
                f"{len(silent)} of {len(rows)} completions without a Latin letter or digit, e.g. row {silent[0].id!r}",
                why=f"{self.variant} reads [a-z0-9]+ only and would score them 0 whatever is written",
                fix="use rougeL_unicode or chrf",
            )


def needs_blanks(rows: Sequence[Row], scorer: str) -> None:
    """Refuse scripts that write no blanks between words: a whole sentence would be one word."""
    han = [row for row in rows if re.search(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]", row.completion)]
    if len(han) * 2 > len(rows):
        raise UserError(
            f"{len(han)} of {len(rows)} completions are in a script without blanks, e.g. row {han[0].id!r}",
            why=f"{scorer} compares words that blanks separate, and would take every sentence for one word",
            fix="use chrf, rougeL_unicode, bleu_zh or exact_match",
        )
