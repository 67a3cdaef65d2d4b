"""How much of every column is scored, and in passes of what size."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from residency.core.errors import UserError

__all__ = ["EvaluationSettings"]

_LEAST = {"batch_tokens": 1, "accuracy_rows": 0, "generation_rows": 0, "generation_batch": 1, "generation_tokens": 1}


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How states are scored.

    Args:
        batch_tokens: Tokens per forward pass; changes speed and memory, not scores (beyond rounding).
        accuracy_rows: Rows per domain whose labels all compete for accuracy; `null` = every row. The price of a row
            is that of its labels: 22 long ones cost up to seven plain rows.
        generation_rows: Rows per domain that are generated for scorers of texts; `null` = every row.
        generation_batch: Prompts that are continued together.
        generation_tokens: Most tokens that are written where no row has a completion; else its longest completion's.

    Raises:
        UserError: A number means nothing.
    """

    batch_tokens: int = 1024
    accuracy_rows: int | None = None
    generation_rows: int | None = None
    generation_batch: int = 48
    generation_tokens: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and value < _LEAST[name]:
                every = ", or null for every row" if name.endswith("rows") else ""
                raise UserError(
                    f"evaluation.{name}={value}",
                    why="it counts what is scored at a time, or at most",
                    fix=f"give a number of at least {_LEAST[name]}{every}",
                )
