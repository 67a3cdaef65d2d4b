"""Which rows are nearly equal: exact Jaccard similarity of shingles, found by prefix filtering.

Order all shingles by how rare they are. Two texts that are t-similar share k of the first |q| - ceil(t |q|) + k
shingles of each (pigeonhole), for every k up to ceil(t |q|). So only these are looked up, and every candidate is
verified: nothing is missed and nothing is found wrongly, unlike with MinHash (Chaudhuri, Ganti and Kaushik 2006;
Bayardo, Ma and Srikant 2007; for k > 1 Wang, Li and Feng 2012). Most texts have more shingles than that which no other
text has, and are done with one look. Texts are looked up many at a time, in arrays.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

__all__ = ["Grams", "NearIndex", "ngram_overlap", "normal_text", "shingles", "shingles_of", "text_key"]

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
_EDGES = re.compile(r"^\W+|\W+$")
_WORDS = re.compile(r"\w+")
_LETTERS = 5  # of a shingle of characters; shorter texts have none
_SHARED = 3  # shingles that two prefixes must share: three by chance are rare, one is not
_PAIRS = 4_000_000  # candidates that are counted at a time
_PRIME = np.uint64(0x9E3779B97F4A7C15)


def normal_text(text: str) -> str:
    """What two texts have in common if they are the same to a reader: NFKC, case, blanks, marks at the edges."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return _EDGES.sub("", " ".join(plain.casefold().split()))


def text_key(text: str) -> str:
    """The normal form, or of a text of nothing but marks the text itself, so that "+" and "-" stay apart."""
    return normal_text(text) or " ".join(text.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Grams:
    """The shingles of one kind of several texts.

    Args:
        places: (m,) which of the texts have shingles of this kind.
        starts: (m + 1,) where the shingles of each begin.
        hashes: Of one text after another, sorted and distinct in each.
    """

    places: Numbers
    starts: Numbers
    hashes: Hashes

    @property
    def sizes(self) -> Numbers:
        """(m,) shingles of each text."""
        return np.diff(self.starts)

    @property
    def owners(self) -> Numbers:
        """Number of the text (0 to m - 1) of every shingle."""
        return np.repeat(np.arange(self.places.size), self.sizes)

    def of(self, number: int) -> Hashes:
        """The shingles of one text."""
        return self.hashes[self.starts[number] : self.starts[number + 1]]


def shingles(text: str) -> dict[str, Hashes]:
    """{kind: sorted distinct hashes}: 5 words from 100 words on, 3 from 20 on, 5 characters below.

    Texts within a quarter of a border have both kinds, so that no pair is missed because it lies across.
    """
    return {kind: grams.hashes for kind, grams in shingles_of([text]).items()}


def shingles_of(texts: Sequence[str]) -> dict[str, Grams]:
    """The same of several texts at once."""
    plain = [text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold() for text in texts]
    words = [_WORDS.findall(text) for text in plain]
    counts = np.array([len(found) for found in words], dtype=np.int64)
    found = {
        "5 words": _word_grams(words, np.flatnonzero(counts >= 80), 5),
        "3 words": _word_grams(words, np.flatnonzero((counts >= 16) & (counts < 125)), 3),
        "characters": _letter_grams(words, np.flatnonzero(counts < 25)),
    }
    return {kind: grams for kind, grams in found.items() if grams.places.size}


def _word_grams(words: Sequence[Sequence[str]], places: Numbers, n: int) -> Grams:
    own = [words[place] for place in places.tolist()]
    codes = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for text in own for word in text]
    return _grams(np.array(codes, dtype=np.uint64), places, [len(text) for text in own], n)


def _letter_grams(words: Sequence[Sequence[str]], places: Numbers) -> Grams:
    own = [" ".join(words[place]) for place in places.tolist()]
    codes = np.frombuffer("".join(own).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    return _grams(codes, places, [len(text) for text in own], _LETTERS)


def _grams(codes: Hashes, places: Numbers, lengths: Sequence[int], n: int) -> Grams:
    """Hashes of all windows of n codes that lie in one text, of texts one after another."""
    hashes = _window_hashes(codes, n)
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    owners = np.repeat(np.arange(places.size), lengths)[: hashes.size]
    inside = np.arange(hashes.size) + n <= ends[owners]
    owners, hashes = owners[inside], hashes[inside]
    order = np.lexsort((hashes, owners))
    owners, hashes = owners[order], hashes[order]
    first = np.ones(hashes.size, dtype=bool)
    first[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
    sizes = np.bincount(owners[first], minlength=places.size)
    starts = np.concatenate([[0], np.cumsum(sizes[sizes > 0])])
    return Grams(places=places[sizes > 0], starts=starts, hashes=hashes[first])


def _window_hashes(codes: Hashes, n: int) -> Hashes:
    """(codes - n + 1,) hash of every window of n codes."""
    total = np.zeros(max(0, codes.size - n + 1), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for k in range(n):
            total = (total ^ codes[k : k + total.size]) * _PRIME
            total ^= total >> np.uint64(29)
    return total


class NearIndex:
    """Texts, and which of them other texts are similar to.

    Args:
        texts: The texts.
        threshold: Smallest Jaccard similarity of shingles, above 0 and at most 1.
    """

    def __init__(self, texts: Sequence[str], *, threshold: float = 0.8) -> None:
        self.threshold = threshold
        self._indices = {kind: _KindIndex(grams, threshold) for kind, grams in shingles_of(texts).items()}

    def similar(self, text: str) -> set[int]:
        """Places of the indexed texts that are similar to a text."""
        return {place for _, place in self.similar_to(shingles_of([text]))}

    def similar_to(self, parts: Mapping[str, Grams]) -> set[tuple[int, int]]:
        """(which of some texts, place of an indexed text that is similar to it); given the texts' shingles."""
        found: set[tuple[int, int]] = set()
        for kind, grams in parts.items():
            if kind in self._indices:
                found |= self._indices[kind].similar_to(grams)
        return found


class _KindIndex:
    """Shingles of one kind, and the texts of whose prefixes they are."""

    def __init__(self, texts: Grams, threshold: float) -> None:
        self.threshold = threshold
        self.texts = texts
        self.keys, at, self.times = np.unique(texts.hashes, return_inverse=True, return_counts=True)
        numbers, hashes = self._prefixes(texts, self.times[at], np.zeros(texts.places.size, dtype=np.int64))
        order = np.argsort(hashes, kind="stable")
        self.owners = numbers[order]
        # Where the texts of a key begin, of every key that some text has.
        self.begins = np.searchsorted(hashes[order], self.keys, side="left")
        self.ends = np.searchsorted(hashes[order], self.keys, side="right")

    def similar_to(self, queries: Grams) -> set[tuple[int, int]]:
        """(place of a query, place of a text) of all similar pairs."""
        at = np.minimum(np.searchsorted(self.keys, queries.hashes), self.keys.size - 1)
        known = self.keys[at] == queries.hashes
        # What no text has is rarer than all they have, and fills the prefix first.
        unknown = np.bincount(queries.owners[~known], minlength=queries.places.size)
        numbers, hashes = self._prefixes(queries, np.where(known, self.times[at], -1), unknown)
        at = np.searchsorted(self.keys, hashes)
        begins, many = self.begins[at], self.ends[at] - self.begins[at]
        found: set[tuple[int, int]] = set()
        bounds = [0, *(np.flatnonzero(np.diff(np.cumsum(many) // _PAIRS)) + 1).tolist(), many.size]
        for first, last in pairwise(bounds):
            # A query's keys stay together: its matches are counted.
            last = int(np.searchsorted(numbers, numbers[last - 1], side="right")) if last else 0
            first = int(np.searchsorted(numbers, numbers[first - 1], side="right")) if first else 0
            found |= self._verified(queries, numbers[first:last], begins[first:last], many[first:last])
        return found

    def _verified(self, queries: Grams, numbers: Numbers, begins: Numbers, many: Numbers) -> set[tuple[int, int]]:
        """The similar pairs among queries and the texts that some of their keys lead to."""
        steps = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
        pairs = np.repeat(numbers, many) * self.texts.places.size + self.owners[np.repeat(begins, many) + steps]
        pairs, shared = np.unique(pairs, return_counts=True)
        asked, there = np.divmod(pairs, self.texts.places.size)
        sizes = queries.sizes[asked], self.texts.sizes[there]
        enough = shared >= np.minimum(_SHARED, np.minimum(*map(self._least, sizes)))
        enough &= np.minimum(*sizes) >= self.threshold * np.maximum(*sizes) - 1e-9
        return {
            (int(queries.places[a]), int(self.texts.places[b]))
            for a, b in zip(asked[enough].tolist(), there[enough].tolist(), strict=True)
            if _similar(queries.of(a), self.texts.of(b), self.threshold)
        }

    def _least(self, sizes: Numbers) -> Numbers:
        """Shingles that a text must share with a similar one."""
        least: Numbers = np.ceil(self.threshold * sizes - 1e-9).astype(np.int64)
        return least

    def _prefixes(self, texts: Grams, times: Numbers, unknown: Numbers) -> tuple[Numbers, Hashes]:
        """(number of the text, shingle) of the prefix of every text, in the order of the texts.

        Args:
            texts: The texts.
            times: How many indexed texts have each shingle; -1 = unknown to the index, and left out.
            unknown: (m,) shingles of each text that no indexed text has: they come first.
        """
        least = self._least(texts.sizes)
        left = texts.sizes - least + np.minimum(_SHARED, least) - unknown
        owners = texts.owners
        kept = (times >= 0) & (left[owners] > 0)
        owners, hashes, times = owners[kept], texts.hashes[kept], times[kept]
        order = np.lexsort((hashes, times, owners))
        owners, hashes = owners[order], hashes[order]
        rank = np.arange(owners.size) - np.searchsorted(owners, owners, side="left")
        chosen = rank < left[owners]
        return owners[chosen], hashes[chosen]


def _similar(a: Hashes, b: Hashes, threshold: float) -> bool:
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


def _word_hashes(words: Sequence[str], n: int) -> Hashes:
    codes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], dtype=np.uint64)
    return np.unique(_window_hashes(codes, n))
