"""Prompts in which a few words are replaced by synonyms of WordNet (after Zhang et al. 2015; Wei and Zou 2019)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, ClassVar

from residency.core.errors import UserError
from residency.core.randomness import choice, permutation
from residency.core.types import Row
from residency.domains.augmentation.base import Asked, Attempt, Augmentation, Material
from residency.domains.augmentation.wordnet import open_wordnet

__all__ = ["Synonyms", "content_words", "free_words", "replace_words"]

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
# What a sentence puts around a word; anything else (a dot inside, a bracket, an underscore) is code or a name.
_ALONE = re.compile(r"(?:(?<!\S)|(?<=\s[(\"']))[a-z]{3,}(?=[.,;:!?)\"']*(?:\s|$))")
_KEPT = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\"[^\"\n]*\"|“[^”\n]*”|«[^»\n]*»", re.DOTALL)
_CODE = re.compile(
    r"[{};]\s*$|^(?: {4}|\t)|\w\(|[=!<>]=|[-=]>|</|\w = |^\s*(?:def|class|import|from|return|#include)\b", re.MULTILINE
)
_NEGATIONS = "no not never none nothing nobody nowhere nor neither without hardly scarcely barely cannot"
_FUNCTION = """
a about above after again against all also although always amid among an and another any are around as at be because
been before behind being below beside between both but by can could despite did do does doing done down during each
either else enough even ever every except few first for from further had has have he her here hers him his how however
if in into is it its itself just last least less like many may me might mine minus more most much must my near next
now of off often on once one only onto or other our out over own past per plus quite rather same shall she should
since so some still such than that the their them then there these they this those though through thus till to too
toward two under unlike until up upon us versus very via was we well were what whatever when where whether which while
who whom whose why will with within would yes yet you your
"""
_NEVER = frozenset((_NEGATIONS + " " + _FUNCTION).split())


def content_words(text: str) -> int:
    """Words that are neither function words nor negations."""
    return sum(word.casefold() not in _NEVER for word in _WORD.findall(text))


def free_words(text: str, *, protected: Collection[str]) -> dict[str, list[int]]:
    """{word: where it begins} of all words that may be replaced, by first appearance.

    Not among them: whatever has a capital (names), a digit, or other characters than letters in or around it; words in
    quotation marks; words of lines that look like code; negations and function words.

    Args:
        text: A prompt.
        protected: Further words that stay, casefolded.
    """
    kept = [match.span() for match in _KEPT.finditer(text)]
    found: dict[str, list[int]] = {}
    start = 0
    for line in text.split("\n"):
        for match in () if _CODE.search(line) else _ALONE.finditer(text, start, start + len(line)):
            word, at = match[0], match.start()
            if word not in _NEVER and word not in protected and not any(a <= at < b for a, b in kept):
                found.setdefault(word, []).append(at)
        start += len(line) + 1
    return found


def replace_words(
    text: str,
    words: dict[str, list[int]],
    synonyms: Callable[[str], Sequence[str]],
    *,
    most: int,
    seed: tuple[Any, ...],
) -> str:
    """A text with words drawn at random, each replaced by one synonym wherever it stands.

    Args:
        text: The text.
        words: From `free_words`.
        synonyms: Of a word; none = it stays.
        most: Places that may change.
        seed: What decides the draws: a number, then words.
    """
    known = [*words]
    new: dict[int, tuple[str, str]] = {}
    for place in permutation(len(known), *seed, "words") if known else ():
        word = known[place]
        fits = [s for s in synonyms(word) if all(_same_article(text, at, word, s) for at in words[word])]
        if fits and len(new) + len(words[word]) <= most:
            chosen = fits[choice(len(fits), *seed, "synonym", word)]
            new.update((at, (word, chosen)) for at in words[word])
    parts, end = [], 0
    for at, (word, chosen) in sorted(new.items()):
        parts += [text[end:at], chosen]
        end = at + len(word)
    return "".join([*parts, text[end:]])


def _same_article(text: str, at: int, word: str, synonym: str) -> bool:
    """Whether "a" or "an" before a word is right before another one, as far as letters tell."""
    before = text[:at].split()[-1:]
    return not before or before[0].casefold() not in ("a", "an") or (word[0] in "aeiou") == (synonym[0] in "aeiou")


class Synonyms(Augmentation):
    """At most a tenth of the content words of a prompt replaced by synonyms: the most frequent sense of WordNet.

    Only words with one part of speech, in the form that a dictionary lists, are replaced; numbers, names, negations,
    quotations, code and the words of labels and completions never are. The completion stays.

    Args:
        wordnet: Folder of WordNet's database files (`index.noun`, `data.noun`, ...).
        share: Most of the content words that change, above 0 and at most 1.

    Raises:
        UserError: The share is out of its range; on reading, there is no WordNet in the folder.
    """

    name: ClassVar[str] = "synonyms"

    def __init__(self, *, wordnet: str, share: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < share <= 1:
            raise UserError(
                f"augment: Synonyms with share={share}",
                why="it is the most of the content words that change, above 0 and at most 1",
                fix="give 0.1",
            )
        self.wordnet, self.share = wordnet, share

    def attempts(self, asked: Sequence[Asked], material: Material) -> Iterator[Attempt]:
        """Dropped as `unchanged`: no word may be replaced, or has a synonym."""
        found = open_wordnet(self.wordnet)
        for one in asked:
            row = one.parent
            words = free_words(row.prompt, protected=_answers(row, material.labels))
            most = int(self.share * content_words(row.prompt) + 1e-9)
            seed = (self.seed, self.name, row.id, one.number)
            prompt = replace_words(row.prompt, words, found.synonyms, most=most, seed=seed)
            yield Attempt(prompt=prompt, dropped="unchanged" if prompt == row.prompt else "")

    def identity(self) -> dict[str, Any]:
        """Options, and the content of the files."""
        return {"share": self.share, "seed": self.seed, "wordnet": open_wordnet(self.wordnet).digest}


def _answers(row: Row, labels: Sequence[str]) -> set[str]:
    """Words of answers: whoever copies one from the prompt must still find it there."""
    texts = (row.completion, row.rejected, *row.references, *labels)
    return {word.casefold() for text in texts for word in _WORD.findall(text)}
