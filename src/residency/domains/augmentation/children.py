"""From attempts to the children of a domain: shares, filters that need all rows, provenance, counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from residency.core.errors import UserError
from residency.core.types import Row
from residency.domains.augmentation.base import PROVENANCE, Asked, Attempt, Augmentation, Material
from residency.domains.doctor.similarity import NearIndex, shingles_of, text_key

__all__ = ["Made", "Written", "make_children", "plan", "shares"]

LEAST_ACCEPTED = 0.1
NEAR = 0.8
_BATCH = 2048


@dataclass(frozen=True, kw_only=True)
class Made:
    """What one method has made for a domain: `data.augmented` of a record.

    Args:
        method: Its name.
        asked: Children that were asked for.
        kept: Children that there are.
        dropped: {filter: children that it dropped}.
        not_asked: Children that `per_row` speaks of and `max_share` does not allow.
        tokens: Read and written by models.
        seconds: That models took; of the process that wrote.
    """

    method: str
    asked: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    not_asked: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Written:
    """The attempts of one method, and what they cost."""

    attempts: tuple[Attempt, ...]
    tokens: int = 0
    seconds: float = 0.0


def shares(rows: int, per_row: Sequence[int], max_share: float) -> list[int]:
    """Children that each method is asked for, so that they are at most `max_share` of the training rows together.

    Args:
        rows: Rows that there are.
        per_row: Children per row of each method.
        max_share: m of children / (children + rows) <= m.
    """
    wanted = [rows * number for number in per_row]
    # A product in binary may lie a hair below the number that is meant.
    allowed = math.floor(max_share / (1 - max_share) * rows + 1e-9)
    if sum(wanted) <= allowed:
        return wanted
    return [number * allowed // sum(wanted) for number in wanted]


def plan(rows: Sequence[Row], count: int) -> list[Asked]:
    """The first child of every row in order, then the second of every row, and so on."""
    return [Asked(parent=rows[k % len(rows)], number=k // len(rows) + 1) for k in range(count)]


def make_children(
    methods: Sequence[Augmentation],
    material: Material,
    scored: Iterable[Row],
    *,
    max_share: float,
    write: Callable[[Augmentation, Sequence[Asked], Material], Written],
) -> tuple[tuple[Row, ...], list[Made]]:
    """The children of a domain's training rows, and what became of those that were asked for.

    Args:
        methods: In the order in which they work.
        material: The rows.
        scored: Validation, test and probe rows of the stream: what equals one of them, or nearly, is dropped.
        max_share: Largest share of children among all training rows.
        write: Gives the attempts of a method.

    Raises:
        UserError: A method cannot work on these rows, or less than a tenth of what it makes is accepted.
    """
    for method in methods:
        method.check(material)
    judge = _Judge(material.rows, [row.prompt for row in scored])
    children: list[Row] = []
    made = []
    counts = shares(len(material.rows), [method.per_row for method in methods], max_share)
    for method, count in zip(methods, counts, strict=True):
        asked = plan(material.rows, count)
        found = write(method, asked, material)
        model = dict(material.base.identity()) if method.needs_base and material.base else None
        tried = [_child(method, one, attempt, model) for one, attempt in zip(asked, found.attempts, strict=True)]
        judged = list(judge.judged(tried))
        kept = [child for child, reason in judged if not reason]
        dropped = Counter(reason for _, reason in judged if reason)
        _check(method, len(kept), count, dropped)
        judge.check_ids(kept, method)
        children += kept
        made.append(
            Made(
                method=method.name,
                asked=count,
                kept=len(kept),
                dropped=dict(dropped),
                not_asked=len(material.rows) * method.per_row - count,
                tokens=found.tokens,
                seconds=found.seconds,
            )
        )
    return tuple(children), made


def _child(method: Augmentation, asked: Asked, attempt: Attempt, model: dict[str, str] | None) -> tuple[Row, str]:
    """The child with its provenance, and the filter of its method that drops it."""
    parent = asked.parent
    provenance: dict[str, Any] = {"method": method.name, "parent": parent.id, "seed": method.seed, **attempt.more}
    provenance |= {} if model is None else {"model": model}
    provenance |= {} if attempt.score is None else {"score": attempt.score}
    provenance |= {"replay": True} if method.replay_augmented else {}
    child = replace(
        parent,
        id=f"{parent.id}~{method.name}{asked.number}",
        group=parent.group or parent.id,
        prompt=attempt.prompt,
        completion=parent.completion if attempt.completion is None else attempt.completion,
        extra={**({} if attempt.own else parent.extra), PROVENANCE: provenance},
    )
    if attempt.own:
        child = replace(child, references=(), weight=1.0)
    return child, attempt.dropped


class _Judge:
    """What only all rows together can tell of a child: whether it is new, and whether it resembles one that is scored.

    Args:
        rows: Training rows.
        scored: Prompts that are scored.
    """

    def __init__(self, rows: Sequence[Row], scored: Sequence[str]) -> None:
        self.scored, self.near = {text_key(text) for text in scored}, NearIndex(scored, threshold=NEAR)
        self.known = {text_key(row.prompt) for row in rows}
        self.ids = {row.id for row in rows}

    def judged(self, tried: Sequence[tuple[Row, str]]) -> Iterator[tuple[Row, str]]:
        """Each child with the filter that drops it: its method's, `near_scored` or `not_new`; empty = it is kept."""
        for start in range(0, len(tried), _BATCH):
            batch = tried[start : start + _BATCH]
            close = {number for number, _ in self.near.similar_to(shingles_of([child.prompt for child, _ in batch]))}
            for number, (child, reason) in enumerate(batch):
                key = text_key(child.prompt)
                if not reason and (key in self.scored or number in close):
                    reason = "near_scored"
                if not reason and key in self.known:
                    reason = "not_new"
                if not reason:
                    self.known.add(key)
                yield child, reason

    def check_ids(self, children: Sequence[Row], method: Augmentation) -> None:
        """No child has the id of another row.

        Raises:
            UserError: One has.
        """
        if twice := [child.id for child in children if child.id in self.ids]:
            raise UserError(
                f"a training row has the id {twice[0]!r}",
                why=f"a child that augment: {type(method).__name__} makes has that id, and scores are stored per id",
                fix="give the row another id, or list a method only once (per_row asks for more children)",
            )
        self.ids |= {child.id for child in children}


def _check(method: Augmentation, kept: int, asked: int, dropped: Counter[str]) -> None:
    if kept < LEAST_ACCEPTED * asked:
        why = ", ".join(f"{name} {count:,}" for name, count in dropped.most_common())
        raise UserError(
            f"augment: {type(method).__name__} made {kept:,} rows that can be used of {asked:,} ({kept / asked:.1%})",
            why=f"below {LEAST_ACCEPTED:.0%}, what is left is what the filters miss; dropped by: {why}",
            fix="leave the method out for this domain, or choose a larger model (for synonyms a larger share)",
        )
