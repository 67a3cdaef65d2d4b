"""Rows in splits that do not leak: dealt out by group, sampled without bias, checked before scores are made of them."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from residency.core.errors import UserError
from residency.core.types import Row, Split

__all__ = ["SALT", "check_splits", "drop_ambiguous", "hash_of", "hash_order", "split_by_group", "split_of"]

SALT = "residency"
"""Before every id and group that is hashed; another salt, another order and other splits."""


def drop_ambiguous(rows: Iterable[Row]) -> list[Row]:
    """Keep one row of equal ones, and none of those whose prompt has more than one completion.

    Prompts are equal if they differ at most in case and blanks: otherwise the same question could be asked in training
    and in the test.
    """
    completions: dict[str, set[str]] = defaultdict(set)
    first: dict[str, Row] = {}
    for row in rows:
        key = _normal(row.prompt)
        completions[key].add(row.completion)
        first.setdefault(key, row)
    return [row for key, row in first.items() if len(completions[key]) == 1]


def hash_order(rows: Iterable[Row], *, salt: str = SALT) -> list[Row]:
    """Rows in the order of the SHA-256 of salt + id: the first n are a sample that no sorting of the source biases."""
    return sorted(rows, key=lambda row: hash_of(row, salt=salt))


def hash_of(row: Row, *, salt: str = SALT) -> bytes:
    """What `hash_order` sorts by."""
    return hashlib.sha256(f"{salt}{row.id}".encode()).digest()


def split_by_group(
    rows: Iterable[Row], *, validation: float = 0.1, test: float = 0.1, salt: str = SALT
) -> dict[Split, list[Row]]:
    """Deal rows out to splits by the SHA-256 of salt + group, so that adding rows never moves old ones.

    Args:
        rows: Rows; one without a group is its own group.
        validation: Share of the groups for validation, 0 to 1.
        test: Share of the groups for the test, 0 to 1.
        salt: Another salt, another split.

    Raises:
        ValueError: A share is negative, or nothing is left to train on.
    """
    if min(validation, test) < 0 or validation + test >= 1:
        raise ValueError(f"shares validation={validation}, test={test} leave nothing to train on")
    splits: dict[Split, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in hash_order(rows, salt=salt):
        splits[split_of(row, validation=validation, test=test, salt=salt)].append(row)
    return splits


def split_of(row: Row, *, validation: float, test: float, salt: str = SALT) -> Split:
    """The split that `split_by_group` deals a row to: which rows there are beside it does not matter."""
    digest = hashlib.sha256(f"{salt}{row.group or row.id}".encode()).digest()
    share = int.from_bytes(digest[:6], "big") / 2**48
    return "test" if share < test else "validation" if share < test + validation else "train"


def check_splits(splits: Mapping[Split, Sequence[Row]], *, source: str, limits: Mapping[Split, int | None]) -> None:
    """What must hold for scores to mean something.

    Args:
        splits: Of a domain.
        source: Where they come from, for messages.
        limits: Of the domain.

    Raises:
        UserError: No row to train or to test on, an id twice in a split, or training rows that return in the test.
    """
    for split, rows in splits.items():
        if not rows and split != "validation":
            raise UserError(
                f"no {split} rows from {source} (max_{split} = {limits[split]})",
                why="a domain needs at least one row to train on and one to test on",
                fix=f"add rows, or raise max_{split}",
            )
        twice = [row_id for row_id, times in Counter(row.id for row in rows).items() if times > 1]
        if twice:
            raise UserError(
                f"{len(twice)} ids more than once in {split} of {source}, e.g. {twice[0]!r}",
                why="scores are stored per id",
                fix="give every row its own id, or none",
            )
    _check_leak(source, splits, "prompt", lambda row: _normal(row.prompt))
    _check_leak(source, splits, "group", lambda row: row.group)


def _check_leak(source: str, splits: Mapping[Split, Sequence[Row]], what: str, key: Callable[[Row], str]) -> None:
    trained = {key(row) for row in splits["train"]} - {""}
    shared = [row for row in splits["test"] if key(row) in trained]
    if shared:
        raise UserError(
            f"{len(shared)} test rows of {source} share their {what} with a training row, "
            f"e.g. row {shared[0].id!r}: {getattr(shared[0], what)[:80]!r}",
            why="the test would measure what was memorised, not what was learnt",
            fix=f"keep all rows of one {what} in one split",
        )


def _normal(prompt: str) -> str:
    return " ".join(prompt.casefold().split())
