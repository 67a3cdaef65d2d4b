"""Domains whose overlap, conflict and difficulty are dials, so that what must be forgotten is known beforehand."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property

from residency.core.errors import UserError
from residency.core.types import Row, Split
from residency.domains.base import Domain, hash_order

__all__ = ["Controlled", "ideal_matrix"]

VALUES = ("amber", "coral", "ivory", "lilac", "olive", "pearl", "rust", "teal")
_WORDINGS = ("The colour of {} is", "Name the colour of {}:", "{} has the colour")
_ASKED = "Which colour has {}?"
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


class Controlled(Domain):
    """Facts "the colour of NAME is VALUE" of one place in a stream, asked in a wording that no training row has.

    The domain at place k holds n facts. The first `overlap` n of its names are the last of the domain before; of these
    a share `conflict` has another colour there. So a learner that always knows what it was told last, and nothing else,
    scores `ideal_matrix`: with one later domain it forgets overlap x conflict of a domain, and an overlap without
    conflict transfers forward. What a real model forgets beyond that is its own.

    Args:
        place: k, from 0.
        facts: n.
        overlap: Share of the facts that the domain shares with the one before, 0 to 1.
        conflict: Share of the shared facts that are told otherwise than there, 0 to 1.
        difficulty: Words of a name, all of which must be read: names of several words are made of few words, so that
            no part of a name tells its colour.
        seed: Of names and colours; equal for the domains of one stream.

    Raises:
        UserError: A dial is out of its range.
    """

    kind = "label"
    source = "made by residency.domains.Controlled"
    licence = "CC0-1.0"
    attribution = "no author: invented names"

    def __init__(
        self,
        *,
        place: int = 0,
        facts: int = 64,
        overlap: float = 0.5,
        conflict: float = 0.5,
        difficulty: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(max_train=None, max_validation=None, max_test=None)
        if place < 0 or facts < 2 or not (0 <= overlap <= 1 and 0 <= conflict <= 1) or not 1 <= difficulty <= 4:
            raise UserError(
                f"a controlled domain with place={place}, facts={facts}, overlap={overlap}, conflict={conflict}, "
                f"difficulty={difficulty}",
                why="place is 0 or more, facts 2 or more, overlap and conflict are shares, difficulty is 1 to 4 words",
                fix="give for example facts: 64, overlap: 0.5, conflict: 0.5, difficulty: 1",
            )
        self.place, self.facts, self.difficulty, self.seed = place, facts, difficulty, seed
        self.shared = round(overlap * facts)
        self.changed = round(conflict * self.shared)

    @property
    def numbers(self) -> range:
        """The numbers of its facts: those of consecutive domains overlap."""
        first = self.place * (self.facts - self.shared)
        return range(first, first + self.facts)

    @cached_property
    def told(self) -> dict[int, str]:
        """Fact -> colour."""
        return self._told(self.place)

    def _told(self, place: int) -> dict[int, str]:
        """What the domain at a place of this stream says, from what those before it say."""
        found: dict[int, str] = {}
        for k in range(place + 1):
            first = k * (self.facts - self.shared)
            shared = range(first, first + self.shared if k else first)
            changed = {*sorted(shared, key=lambda n: self._draw("changed", k, n))[: self.changed]}
            now = {}
            for n in range(first, first + self.facts):
                before = found.get(n)
                if before is None:
                    now[n] = VALUES[self._draw("value", n) % len(VALUES)]
                elif n in changed:
                    step = 1 + self._draw("step", k, n) % (len(VALUES) - 1)
                    now[n] = VALUES[(VALUES.index(before) + step) % len(VALUES)]
                else:
                    now[n] = before
            found = now
        return found

    def _draw(self, *about: object) -> int:
        text = " ".join(map(str, (self.seed, *about)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")

    def name(self, number: int) -> str:
        """The name of a fact: `difficulty` words."""
        # Blocks of `facts` numbers use the same few words in all combinations; another block has other words.
        block, inner = divmod(number, self.facts)
        base = math.ceil(self.facts ** (1 / self.difficulty))
        words = []
        for position in range(self.difficulty):
            inner, digit = divmod(inner, base)
            words.append(self._word(block, position, digit))
        return " ".join(words)

    def _word(self, block: int, position: int, digit: int) -> str:
        drawn = self._draw("word", block, position, digit)
        parts = [_SYLLABLES[drawn // len(_SYLLABLES) ** i % len(_SYLLABLES)] for i in range(4)]
        return "".join(parts).capitalize()

    def read(self) -> Mapping[Split, Sequence[Row]]:
        """Three wordings of every fact to train on; another one of every fact to score."""
        rows: dict[Split, list[Row]] = {"train": [], "validation": [], "test": []}
        for n, colour in self.told.items():
            name = self.name(n)
            for i, wording in enumerate(_WORDINGS):
                rows["train"].append(Row(id=f"{n}/{i}", prompt=wording.format(name), completion=colour))
            rows["test"].append(Row(id=str(n), prompt=_ASKED.format(name), completion=colour))
        return {split: hash_order(part) for split, part in rows.items()}


def ideal_matrix(domains: Sequence[Controlled]) -> list[list[float]]:
    """(T + 1, T) the accuracies of a learner that knows every fact as it was told last, and guesses the others.

    Args:
        domains: In the order of learning.
    """
    known: dict[int, str] = {}
    rows = []
    for stage in range(len(domains) + 1):
        if stage:
            known = {**known, **domains[stage - 1].told}
        rows.append([_accuracy(domain, known) for domain in domains])
    return rows


def _accuracy(domain: Controlled, known: Mapping[int, str]) -> float:
    guess = 1 / len(VALUES)
    right = [guess if n not in known else float(known[n] == colour) for n, colour in domain.told.items()]
    return sum(right) / len(right)
