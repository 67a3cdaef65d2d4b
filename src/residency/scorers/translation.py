"""Scores of machine translation, by sacrebleu: chrF and BLEU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

from residency.core.errors import UserError
from residency.core.types import Row
from residency.scorers.base import Answer, Scorer, references
from residency.scorers.overlap import needs_blanks

__all__ = ["BLEU", "ChrF", "check_words", "sacrebleu_metric"]


@dataclass(frozen=True, kw_only=True)
class ChrF(Scorer):
    """Sentence chrF of sacrebleu (Popovic 2015), 0 to 1; a column is the mean over rows (`CorpusChrF`: all together).

    Args:
        word_order: 0 for chrF, 2 for chrF++.
        char_order: Longest n-gram of characters.
        beta: Weight of recall against precision.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"chrf": {"word_order": 0}, "chrf++": {"word_order": 2}}
    unit: ClassVar[str] = "mean sentence chrF, 0 to 1"
    needs: ClassVar[Literal["generation"]] = "generation"
    libraries: ClassVar[tuple[str, ...]] = ("sacrebleu",)

    word_order: int = 0
    char_order: int = 6
    beta: int = 2

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 to 1."""
        metric = sacrebleu_metric("CHRF", word_order=self.word_order, char_order=self.char_order, beta=self.beta)
        return [
            metric.sentence_score(answer.text or "", [*references(row)]).score / 100
            for row, answer in zip(rows, answers, strict=True)
        ]

    def check(self, rows: Sequence[Row]) -> None:
        """The library is there."""
        sacrebleu_metric("CHRF")


@dataclass(frozen=True, kw_only=True)
class BLEU(Scorer):
    """Sentence BLEU of sacrebleu (Post 2018), 0 to 1; a column is the mean over rows, not the corpus score.

    Exponential smoothing and effective order, sacrebleu's own for sentences: a text of three words is not judged by
    4-grams. Published tables are of corpora: compare `CorpusBLEU` with them, never these.

    Args:
        tokenize: sacrebleu's tokenizer; `zh`, `ja-mecab` or `char` for scripts without blanks, which 13a scores 0.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"bleu": {"tokenize": "13a"}, "bleu_zh": {"tokenize": "zh"}}
    unit: ClassVar[str] = "mean sentence BLEU, 0 to 1"
    needs: ClassVar[Literal["generation"]] = "generation"
    libraries: ClassVar[tuple[str, ...]] = ("sacrebleu",)

    tokenize: Literal["13a", "zh", "ja-mecab", "char", "intl", "none"] = "13a"

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 to 1."""
        metric = sacrebleu_metric("BLEU", tokenize=self.tokenize, effective_order=True)
        return [
            metric.sentence_score(answer.text or "", [*references(row)]).score / 100
            for row, answer in zip(rows, answers, strict=True)
        ]

    def check(self, rows: Sequence[Row]) -> None:
        """The library is there, and words are separated by blanks where its tokenizer goes by blanks."""
        check_words(rows, self.tokenize, "bleu")


def check_words(rows: Sequence[Row], tokenize: str, name: str) -> None:
    """Refuse rows in which a tokenizer of BLEU finds no words.

    Args:
        rows: To be judged.
        tokenize: Of sacrebleu; the library has to be there for it.
        name: Of the scorer.
    """
    sacrebleu_metric("BLEU", tokenize=tokenize)
    if tokenize in ("13a", "intl", "none"):
        needs_blanks(rows, name)


@cache
def sacrebleu_metric(kind: str, **options: Any) -> Any:
    """A metric of sacrebleu, made once.

    Args:
        kind: `BLEU` or `CHRF`.
        options: Of it.

    Raises:
        UserError: The package is missing.
    """
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise UserError(
            f"the scorer {kind.lower()} without the package sacrebleu",
            why="it computes the score",
            fix='pip install "residency[text]"',
        ) from error
    return getattr(metrics, kind)(**options)
