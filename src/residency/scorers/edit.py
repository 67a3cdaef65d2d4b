"""Edit similarity of characters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from residency.core.types import Row
from residency.scorers.base import Answer, Scorer, references

__all__ = ["EditSimilarity", "edit_similarity"]


def edit_similarity(a: str, b: str) -> float:
    """2 LCS / (|a| + |b|), the indel similarity of characters, 0 to 1; exact, not rounded to whole percent.

    >>> edit_similarity("tide", "diet"), round(edit_similarity("kitten", "sitting"), 3)
    (0.5, 0.615)
    """
    if not a or not b:
        return float(a == b)
    # Bit-parallel length of the longest common subsequence (Hyyro 2004): one word operation per character of b.
    places: dict[str, int] = {}
    for i, char in enumerate(a):
        places[char] = places.get(char, 0) | 1 << i
    whole = (1 << len(a)) - 1
    state = whole
    for char in b:
        match = state & places.get(char, 0)
        state = ((state + match) | (state - match)) & whole
    return 2 * (len(a) - state.bit_count()) / (len(a) + len(b))


_MARKERS = re.compile(r"<(NUM|STR|CHAR)_LIT(?::(.*?))?>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class EditSimilarity(Scorer):
    """Indel similarity of answer and completion: what CodeXGLUE and TRACE report of generated code.

    Args:
        markers: Replace the markers of Py150 first: `<NUM_LIT>` by 0, `<STR_LIT>` and `<CHAR_LIT>` by nothing,
            `<STR_LIT:x>` by x.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"edit_similarity": {}}
    unit: ClassVar[str] = "edit similarity of characters, 0 to 1"
    needs: ClassVar[Literal["generation"]] = "generation"

    markers: bool = True

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 to 1."""
        return [
            max(edit_similarity(self._plain(answer.text or ""), self._plain(text)) for text in references(row))
            for row, answer in zip(rows, answers, strict=True)
        ]

    def _plain(self, text: str) -> str:
        text = text.strip()
        if not self.markers:
            return text
        return _MARKERS.sub(lambda m: m[2] if m[2] is not None else "0" if m[1] == "NUM" else "", text)
