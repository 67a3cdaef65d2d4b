"""SARI: whether a simplification keeps, deletes and adds what several people keep, delete and add."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from residency.core.errors import UserError
from residency.core.types import Row
from residency.scorers.base import Answer, Scorer, references

__all__ = ["SARI", "sari"]

Grams = Counter[tuple[str, ...]]


def sari(source: Sequence[str], answer: Sequence[str], wanted: Sequence[Sequence[str]], *, order: int = 4) -> float:
    """SARI of one sentence, 0 to 1 (Xu et al. 2016), in the convention of the `evaluate` card.

    Mean over n = 1 ... order of F1 of kept, precision of deleted, F1 of added n-grams; counts are multiplied by the
    number of references; a share of an empty set is 1; the recall of what is kept is over counts.

    Args:
        source: (words,) of the text to simplify.
        answer: (words,) of the simplification.
        wanted: References, each (words,).
        order: Longest n-gram.
    """
    keep, delete, add = 0.0, 0.0, 0.0
    for n in range(1, order + 1):
        k, d, a = _operations(_grams(source, n), _grams(answer, n), [_grams(text, n) for text in wanted])
        keep, delete, add = keep + k / order, delete + d / order, add + a / order
    return (keep + delete + add) / 3


def _operations(source: Grams, answer: Grams, wanted: Sequence[Grams]) -> tuple[float, float, float]:
    """(F1 of kept, precision of deleted, F1 of added)."""
    times = len(wanted)
    together: Grams = Counter()
    for one in wanted:
        together.update(one)
    source_times = Counter({gram: count * times for gram, count in source.items()})
    answer_times = Counter({gram: count * times for gram, count in answer.items()})

    kept = source_times & answer_times
    kept_good, kept_all = kept & together, source_times & together
    precision = _share(sum(kept_good[gram] / kept[gram] for gram in kept_good), len(kept))
    recall = _share(sum(kept_good.values()), sum(kept_all.values()))

    deleted = source_times - answer_times
    deleted_good = deleted - together
    deletion = _share(sum(deleted_good[gram] / deleted[gram] for gram in deleted_good), len(deleted))

    added = {*answer} - {*source}
    added_good, added_all = added & {*together}, {*together} - {*source}
    addition = _f1(_share(len(added_good), len(added)), _share(len(added_good), len(added_all)))
    return _f1(precision, recall), deletion, addition


def _grams(words: Sequence[str], n: int) -> Grams:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@dataclass(frozen=True, kw_only=True)
class SARI(Scorer):
    """SARI of the answer against source and references, 0 to 1; lower case, words as sacrebleu's 13a splits them.

    The source is the row's prompt without what stands before `after`: an instruction is not to be simplified.

    Args:
        after: The source begins behind the first occurrence of this text; the whole prompt where it is empty.
        tokenize: `13a`, or `blanks` where the texts are tokenised already.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sari": {}}
    unit: ClassVar[str] = "SARI, 0 to 1"
    needs: ClassVar[Literal["generation"]] = "generation"
    libraries: ClassVar[tuple[str, ...]] = ("sacrebleu",)

    after: str = ""
    tokenize: Literal["13a", "blanks"] = "13a"

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 to 1."""
        return [
            sari(self._words(self.source(row)), self._words(a.text or ""), [self._words(t) for t in references(row)])
            for row, a in zip(rows, answers, strict=True)
        ]

    def source(self, row: Row) -> str:
        """The text that is to be simplified."""
        return row.prompt.partition(self.after)[2].strip() if self.after else row.prompt

    def check(self, rows: Sequence[Row]) -> None:
        """Every prompt has a source.

        Raises:
            UserError: Naming a row without one, or the missing package.
        """
        self._words("a")
        without = [row.id for row in rows if not self.source(row)]
        if without:
            raise UserError(
                f"{len(without)} prompts without {self.after!r} and a text behind it, e.g. row {without[0]!r}",
                why="SARI compares the answer with the text that was to be simplified",
                fix="set `after` to what ends the instruction, or leave it out to take the whole prompt",
            )

    def _words(self, text: str) -> list[str]:
        if self.tokenize == "blanks":
            return text.lower().split()
        try:
            from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
        except ImportError as error:
            raise UserError(
                "the scorer sari without the package sacrebleu",
                why="it splits texts into words",
                fix='pip install "residency[text]"',
            ) from error
        tokenizer: Any = Tokenizer13a
        return str(tokenizer()(text.lower())).split()
