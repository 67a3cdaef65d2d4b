"""Which rows are nearly equal: exact Jaccard similarity of shingles, found by prefix filtering.

Order all shingles by how rare they are. Two texts that are t-similar share one of the first |q| - ceil(t |q|) + 1
shingles of each (pigeonhole). So only these are looked up, and every candidate is verified: nothing is missed and
nothing is found wrongly, unlike with MinHash (Chaudhuri, Ganti and Kaushik 2006; Bayardo, Ma and Srikant 2007). Most
texts have more shingles than that which no other text has, and are done with one look.
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["NearIndex", "ngram_overlap", "normal_text", "shingles", "text_key"]

Hashes = npt.NDArray[np.uint64]
_EDGES = re.compile(r"^\W+|\W+$")
_WORDS = re.compile(r"\w+")
_LETTERS = 5  # of a shingle of characters; shorter texts have none
_PRIME = np.uint64(0x9E3779B97F4A7C15)


def normal_text(text: str) -> str:
    """What two texts have in common if they are the same to a reader: NFKC, case, blanks, marks at the edges."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return _EDGES.sub("", " ".join(plain.casefold().split()))


def text_key(text: str) -> str:
    """The normal form, or of a text of nothing but marks the text itself, so that "+" and "-" stay apart."""
    return normal_text(text) or " ".join(text.split())


def shingles(text: str) -> dict[str, Hashes]:
    """{kind: sorted distinct hashes}: 5 words from 100 words on, 3 from 20 on, 5 characters below.

    Texts within a quarter of a border have both kinds, so that no pair is missed because it lies across.
    """
    words = _WORDS.findall(text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold())
    count, found = len(words), {}
    if count >= 80:
        found["5 words"] = _word_hashes(words, 5)
    if 16 <= count < 125:
        found["3 words"] = _word_hashes(words, 3)
    if count < 25:
        found["characters"] = _letter_hashes(" ".join(words))
    return {kind: hashes for kind, hashes in found.items() if hashes.size}


def _word_hashes(words: Sequence[str], n: int) -> Hashes:
    codes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], dtype=np.uint64)
    return _windows(codes, n)


def _letter_hashes(text: str) -> Hashes:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    return _windows(codes, _LETTERS)


def _windows(codes: Hashes, n: int) -> Hashes:
    """Sorted distinct hashes of all windows of n codes."""
    if codes.size < n:
        return np.zeros(0, dtype=np.uint64)
    total = np.zeros(codes.size - n + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for k in range(n):
            total = (total ^ codes[k : codes.size - n + 1 + k]) * _PRIME
            total ^= total >> np.uint64(29)
    return np.unique(total)


@dataclass(frozen=True, slots=True)
class _Text:
    place: int
    hashes: Hashes


class NearIndex:
    """Texts, and which of them another text is similar to.

    Args:
        texts: The texts.
        threshold: Smallest Jaccard similarity of shingles, above 0 and at most 1.
    """

    def __init__(self, texts: Sequence[str], *, threshold: float = 0.8) -> None:
        self.threshold = threshold
        by_kind: dict[str, list[_Text]] = defaultdict(list)
        for place, text in enumerate(texts):
            for kind, hashes in shingles(text).items():
                by_kind[kind].append(_Text(place, hashes))
        self._indices = {kind: _KindIndex(own, threshold) for kind, own in by_kind.items()}

    def similar(self, text: str) -> set[int]:
        """Places of the indexed texts that are similar to a text."""
        return self.similar_to(shingles(text)) if self._indices else set()

    def similar_to(self, parts: Mapping[str, Hashes]) -> set[int]:
        """The same of a text whose shingles are known: they are the dearest part where there is more than one index."""
        found: set[int] = set()
        for kind, hashes in parts.items():
            if kind in self._indices:
                found |= self._indices[kind].similar_to(hashes)
        return found


class _KindIndex:
    """Shingles of one kind, rarest first, and whose prefixes they are in."""

    def __init__(self, texts: Sequence[_Text], threshold: float) -> None:
        self.threshold = threshold
        self.keys, self.times = np.unique(np.concatenate([one.hashes for one in texts]), return_counts=True)
        self.owners: dict[int, list[_Text]] = defaultdict(list)
        for one in texts:
            times = self.times[np.searchsorted(self.keys, one.hashes)]
            for key in self._rarest(one.hashes, times, self._prefix(one.hashes.size)):
                self.owners[key].append(one)

    def similar_to(self, hashes: Hashes) -> set[int]:
        at = np.minimum(np.searchsorted(self.keys, hashes), self.keys.size - 1)
        known = self.keys[at] == hashes
        # What no text has is rarer than all they have, and fills the prefix first.
        left = self._prefix(hashes.size) - int(hashes.size - np.count_nonzero(known))
        if left <= 0:
            return set()
        keys = self._rarest(hashes[known], self.times[at[known]], left)
        candidates = {one.place: one for key in keys for one in self.owners.get(key, ())}
        return {p for p, one in candidates.items() if _similar(one.hashes, hashes, self.threshold)}

    def _prefix(self, size: int) -> int:
        return size - math.ceil(self.threshold * size - 1e-9) + 1

    @staticmethod
    def _rarest(hashes: Hashes, times: npt.NDArray[np.int64], many: int) -> list[int]:
        rarest: list[int] = hashes[np.lexsort((hashes, times))[:many]].tolist()
        return rarest


def _similar(a: Hashes, b: Hashes, threshold: float) -> bool:
    low, high = sorted((a.size, b.size))
    if low < threshold * high - 1e-9:
        return False
    both = np.intersect1d(a, b, assume_unique=True).size
    return both >= threshold * (a.size + b.size - both) - 1e-9


def ngram_overlap(queries: Sequence[str], sources: Iterator[str], *, n: int = 13) -> list[int]:
    """Places of the queries that share n words in a row with some source; shorter queries never do.

    Args:
        queries: Texts.
        sources: Texts that are streamed past them.
        n: Words.
    """
    owners: dict[int, list[int]] = defaultdict(list)
    for place, text in enumerate(queries):
        for key in _word_hashes(_WORDS.findall(text.casefold()), n).tolist():
            owners[key].append(place)
    if not owners:
        return []
    found: set[int] = set()
    for text in sources:
        words = _WORDS.findall(text.casefold())
        if len(words) >= n:
            for key in _word_hashes(words, n).tolist():
                found.update(owners.get(key, ()))
    return sorted(found)
