"""The score of every row of one state, and what is summed up of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

__all__ = ["Evaluation", "RowScore", "count_rows", "means"]


@dataclass(frozen=True, slots=True)
class RowScore:
    """One score of one row.

    Args:
        column: Domain or probe.
        row: `Row.id`.
        scorer: Name.
        value: The score; `nll` is the mean over the row's tokens.
        tokens: Completion tokens.
        weight: Of the row in the column's mean: tokens for `nll`, bytes for `bits_per_byte`, else 1.
        ended: Whether what was written for it stopped by itself and not at the limit.
    """

    column: str
    row: str
    scorer: str
    value: float
    tokens: int
    weight: int = 1
    ended: bool = True


Evaluation = list[RowScore]


def means(scores: Evaluation) -> dict[str, dict[str, float]]:
    """{scorer: {column: mean}}: over rows by their weights."""
    sums: dict[tuple[str, str], float] = defaultdict(float)
    weights: dict[tuple[str, str], int] = defaultdict(int)
    for score in scores:
        sums[score.scorer, score.column] += score.weight * score.value
        weights[score.scorer, score.column] += score.weight
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for (scorer, column), total in sums.items():
        found[scorer][column] = total / weights[scorer, column]
    return dict(found)


def count_rows(scores: Evaluation) -> dict[str, Any]:
    """{"scored": {scorer: {column: rows}}, "unfinished": {column: answers that did not end by themselves}}."""
    scored: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    unfinished: dict[str, set[str]] = defaultdict(set)
    for score in scores:
        scored[score.scorer][score.column] += 1
        if not score.ended:
            unfinished[score.column].add(score.row)
    return {
        "scored": {scorer: dict(columns) for scorer, columns in scored.items()},
        "unfinished": {column: len(rows) for column, rows in unfinished.items()},
    }
