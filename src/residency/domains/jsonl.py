"""A domain from your own JSON Lines files: the short name of `Table`."""

from __future__ import annotations

from typing import Any

from residency.domains.table import Table

__all__ = ["Jsonl"]


class Jsonl(Table):
    """Rows from JSON Lines files (or any other that `Table` reads), one for training and one for the test.

    Args:
        train: File of the training rows.
        test: File of the test rows.
        validation: File of the validation rows; null takes a tenth of the groups of `train`.
    """

    def __init__(self, *, train: str, test: str, validation: str | None = None, **options: Any) -> None:
        super().__init__(train=train, test=test, validation=validation, **options)
