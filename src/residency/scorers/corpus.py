"""Scores of a whole column of translations, as papers give them: sacrebleu's corpus BLEU and corpus chrF."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from residency.core.types import Row
from residency.scorers.base import Answer, Scorer, references
from residency.scorers.translation import check_words, sacrebleu_metric

__all__ = ["CorpusBLEU", "CorpusChrF", "linearised"]


def linearised(whole: float, without: Sequence[float]) -> list[float]:
    """Values of rows whose mean is the score of all rows together, and whose spread is that score's own.

    v_i = θ + (n - 1) (mean of θ_(j) over j - θ_(i)), the jackknife's pseudo-values about θ (Efron and Tibshirani 1993,
    An Introduction to the Bootstrap, section 11.3). The variance of their mean is the jackknife variance of θ, so that
    intervals and paired tests over rows are those of the score. Of one row alone such a value says nothing.

    Args:
        whole: θ, the score of n rows.
        without: (n,) θ_(i), the score without each of them.
    """
    if len(without) < 2:
        return [whole] * len(without)
    middle = sum(without) / len(without)
    return [whole + (len(without) - 1) * (middle - one) for one in without]


@dataclass(frozen=True, kw_only=True)
class _Corpus(Scorer):
    """A score that is a function of sums over rows."""

    needs: ClassVar[Literal["generation"]] = "generation"
    whole_column: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("sacrebleu",)

    @abstractmethod
    def metric(self) -> Any:
        """The metric of sacrebleu."""

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) values with the corpus score, 0 to 1, as their mean (`linearised`)."""
        if not rows:
            return []
        metric, counts = self.metric(), self._counts(rows, answers)
        total = [sum(column) for column in zip(*counts, strict=True)]
        rest = ([a - b for a, b in zip(total, own, strict=True)] for own in counts)
        without = [_score(metric, sums) for sums in rest] if len(rows) > 1 else [0.0]
        return linearised(_score(metric, total), without)

    def corpus(self, rows: Sequence[Row], answers: Sequence[Answer]) -> float:
        """sacrebleu's `corpus_score` of at least one answer, 0 to 1."""
        return _score(self.metric(), [sum(column) for column in zip(*self._counts(rows, answers), strict=True)])

    def _counts(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[list[int]]:
        """(rows, k) what the score is computed from, summed over rows."""
        right = [references(row) for row in rows]
        most = max(map(len, right))
        streams = [[own[k] if k < len(own) else None for own in right] for k in range(most)]
        # What sacrebleu's own significance tests resample.
        found: list[list[int]] = self.metric()._extract_corpus_statistics([a.text or "" for a in answers], streams)
        return found


def _score(metric: Any, sums: list[int]) -> float:
    return float(metric._compute_score_from_stats(sums).score) / 100


@dataclass(frozen=True, kw_only=True)
class CorpusBLEU(_Corpus):
    """Corpus BLEU of sacrebleu (Post 2018), 0 to 1: n-grams of all answers are counted together.

    Exponential smoothing, no effective order, one brevity penalty for the column: sacrebleu's defaults, what papers
    report.

    Args:
        tokenize: sacrebleu's tokenizer; `zh`, `ja-mecab` or `char` for scripts without blanks, which 13a scores 0.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "corpus_bleu": {"tokenize": "13a"},
        "corpus_bleu_zh": {"tokenize": "zh"},
    }
    unit: ClassVar[str] = "corpus BLEU, 0 to 1"

    tokenize: Literal["13a", "zh", "ja-mecab", "char", "intl", "none"] = "13a"

    def metric(self) -> Any:
        """The metric of sacrebleu."""
        return sacrebleu_metric("BLEU", tokenize=self.tokenize, force=True)

    def check(self, rows: Sequence[Row]) -> None:
        """The library is there, and words are separated by blanks where its tokenizer goes by blanks."""
        check_words(rows, self.tokenize, self.name)


@dataclass(frozen=True, kw_only=True)
class CorpusChrF(_Corpus):
    """Corpus chrF of sacrebleu (Popovic 2015), 0 to 1: n-grams of all answers are counted together.

    Args:
        word_order: 0 for chrF, 2 for chrF++.
        char_order: Longest n-gram of characters.
        beta: Weight of recall against precision.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "corpus_chrf": {"word_order": 0},
        "corpus_chrf++": {"word_order": 2},
    }
    unit: ClassVar[str] = "corpus chrF, 0 to 1"

    word_order: int = 0
    char_order: int = 6
    beta: int = 2

    def metric(self) -> Any:
        """The metric of sacrebleu."""
        return sacrebleu_metric("CHRF", word_order=self.word_order, char_order=self.char_order, beta=self.beta)

    def check(self, rows: Sequence[Row]) -> None:
        """The library is there."""
        self.metric()
