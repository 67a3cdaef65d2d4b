"""Which rows are nearly equal: exact Jaccard similarity of shingles, found by prefix filtering.

Of any |q| - ceil(t |q|) + 1 shingles of a text q, at least one is in every text that is t-similar to it (pigeonhole).
So the rarest of them are looked up in all other texts, and every candidate is verified: nothing is missed and nothing
is found wrongly, unlike with MinHash (Chaudhuri, Ganti and Kaushik 2006; Bayardo, Ma and Srikant 2007).
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
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
        self._prefixes = {kind: _prefix_index(own, threshold) for kind, own in by_kind.items()}
        self._keys = {kind: np.fromiter(index, np.uint64, len(index)) for kind, index in self._prefixes.items()}
        for keys in self._keys.values():
            keys.sort()

    def similar(self, text: str) -> set[int]:
        """Places of the indexed texts that are similar to a text."""
        found: set[int] = set()
        if not self._prefixes:
            return found
        for kind, hashes in shingles(text).items():
            if kind not in self._prefixes:
                continue
            keys = self._keys[kind]
            at = np.searchsorted(keys, hashes)
            at[at == keys.size] = 0
            hits = hashes[keys[at] == hashes]
            index = self._prefixes[kind]
            candidates = {one.place: one for key in hits.tolist() for one in index[key] if one.place not in found}
            found |= {place for place, one in candidates.items() if _jaccard(one.hashes, hashes) >= self.threshold}
        return found


def _prefix_index(texts: Sequence[_Text], threshold: float) -> dict[int, list[_Text]]:
    """{hash: texts that have it among the rarest that a similar text must share one of}."""
    times: Counter[int] = Counter()
    for one in texts:
        times.update(one.hashes.tolist())
    index: dict[int, list[_Text]] = defaultdict(list)
    for one in texts:
        own = sorted(one.hashes.tolist(), key=lambda h: (times[h], h))
        for key in own[: len(own) - math.ceil(threshold * len(own)) + 1]:
            index[key].append(one)
    return dict(index)


def _jaccard(a: Hashes, b: Hashes) -> float:
    low, high = sorted((a.size, b.size))
    if low < 0.5 * high:
        return 0.0
    both = np.intersect1d(a, b, assume_unique=True).size
    return float(both / (a.size + b.size - both))


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
