"""What every template does: rows become token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from residency.core.types import Example, Row, Split
from residency.domains.lengths import TooLong

__all__ = ["RowTemplate"]


class RowTemplate(Protocol):
    """How rows become tokens: a frozen dataclass, whose fields are part of the domain's fingerprint."""

    @property
    def too_long(self) -> TooLong | None:
        """What happens to rows that are too long; `None` = training rows are left out, up to 1 % of them."""

    def encode(
        self, tokenizer: Any, *, domain: str, row: Row, labels: Sequence[str] = (), split: Split = "train"
    ) -> Example:
        """Turn one row into token ids."""
