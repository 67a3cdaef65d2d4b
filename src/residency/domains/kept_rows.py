"""The rows of a domain that is larger than memory: those that its limits keep, found in one pass."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from typing import get_args

from residency.core.errors import UserError
from residency.core.types import Row, Split
from residency.domains.splits import hash_of, split_of

__all__ = ["KeptRows", "check_limits", "keep_rows"]

_NO_LIMIT = 10**9


class KeptRows:
    """The first rows in hash order of all that are added: `hash_order(rows)[:limit]`, without holding the others.

    Args:
        limit: How many; `None` keeps all.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.added = 0
        """Rows that were added so far, kept or not."""
        self._heap: list[tuple[int, int, Row]] = []  # negative, so that the last in order is at its top

    def add(self, row: Row) -> None:
        """Keep a row until enough are known that come before it."""
        self.added += 1
        # Rows of equal ids stay in the order of the file, as in a stable sort.
        entry = (-int.from_bytes(hash_of(row), "big"), -self.added, row)
        if self.limit is None or len(self._heap) < self.limit:
            heapq.heappush(self._heap, entry)
        elif self._heap and entry > self._heap[0]:
            heapq.heapreplace(self._heap, entry)

    def rows(self) -> list[Row]:
        """What is kept, in hash order."""
        return [row for *_, row in sorted(self._heap, reverse=True)]


def check_limits(limits: Mapping[Split, int | None], own: Collection[Split]) -> None:
    """What is kept of a stream has to have an end.

    Args:
        limits: Of the domain.
        own: Splits that have a file of their own, the training split among them.

    Raises:
        UserError: No limit on the training rows, or on a split that is drawn from them.
    """
    drawn = [split for split in get_args(Split) if split == "train" or split not in own]
    if free := [split for split in drawn if (limit := limits[split]) is None or limit >= _NO_LIMIT]:
        names = " and ".join(f"max_{split}" for split in free)
        files = [split for split in free if split != "train"]
        raise UserError(
            f"streaming: true without {names}",
            why="of a training set that may be larger than memory, the rows that are kept have to be bounded"
            + (f", and a tenth of its groups becomes {' and another '.join(files)}" if files else ""),
            fix=f"set {names} to a number of rows" + (f", or give a {' and a '.join(files)} file" if files else ""),
        )


def keep_rows(found: Mapping[Split, Iterable[Row]], limits: Mapping[Split, int | None]) -> dict[Split, KeptRows]:
    """The rows that `split_by_group` and the limits leave of what is read; each part is gone through once.

    Args:
        found: Rows by split; of a split that is not there, a tenth of the groups of `train` is taken.
        limits: Rows of each split.
    """
    kept = {split: KeptRows(limits[split]) for split in get_args(Split)}
    validation, test = (0.0 if split in found else 0.1 for split in ("validation", "test"))
    for split, rows in found.items():
        for row in rows:
            dealt = split_of(row, validation=validation, test=test) if split == "train" else split
            kept[dealt].add(row)
    return kept
