"""One finding of the doctor, and what decides how grave it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from residency.core.types import Row, Split
from residency.domains.base import Domain
from residency.domains.doctor.similarity import text_key

__all__ = ["Column", "Finding", "Severity", "Splits", "make_finding", "sort_findings"]

Severity = Literal["error", "warning", "info"]
Splits = Mapping[Split, Sequence[Row]]
_ORDER = {"error": 0, "warning": 1, "info": 2}
_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One domain or probe, as the checks see it.

    Args:
        name: In the config.
        domain: Its template, kind and scorers.
        splits: {split: rows} after the limits.
        given: {split: rows} that there were before the limits.
        probe: Whether it is only scored.
    """

    name: str
    domain: Domain
    splits: Splits
    given: Mapping[Split, int]
    probe: bool = False
    _keys: dict[str, tuple[str, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def keys(self, split: str) -> tuple[str, ...]:
        """(rows,) the prompts of a split as a reader compares them (`text_key`); found once."""
        if split not in self._keys:
            self._keys[split] = tuple(text_key(row.prompt) for row in self.rows(split))
        return self._keys[split]

    def rows(self, split: str) -> Sequence[Row]:
        """The rows of a split; none where there is no such split."""
        return self.splits.get(cast(Split, split), ())

    @property
    def kind(self) -> str:
        """`label` or `generative`."""
        return self.domain.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something about the data that a user should know.

    Args:
        check: Stable name, such as `leak` or `cut_answer`.
        severity: `error`: scores would mean something else than they seem to; `warning`: look at it; `info`.
        domain: Where.
        split: Where.
        count: Rows (or other things) that it concerns.
        share: Of the rows of the split, 0 to 1.
        rows: Ids of the first of them.
        got: What was found.
        why: Why it matters.
        fix: What to do.
    """

    check: str
    severity: Severity
    domain: str
    split: str
    count: int
    share: float
    rows: tuple[str, ...]
    got: str
    why: str
    fix: str

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "rows": list(self.rows), "share": round(self.share, 6)}


def make_finding(
    check: str,
    severity: Severity,
    where: tuple[str, str],
    rows: Iterable[str],
    *,
    of: int,
    got: str,
    why: str,
    fix: str,
    count: int | None = None,
) -> Finding:
    """A finding about some rows of a split.

    Args:
        check: Name.
        severity: How grave.
        where: (domain, split).
        rows: Ids of all rows that it concerns.
        of: Rows of the split.
        got: What was found; `{n}` is replaced by the count.
        why: Why it matters.
        fix: What to do.
        count: Where it is not the number of rows.
    """
    ids = list(rows)
    n = len(ids) if count is None else count
    return Finding(
        check=check,
        severity=severity,
        domain=where[0],
        split=where[1],
        count=n,
        share=n / of if of else 0.0,
        rows=tuple(ids[:_NAMED]),
        got=got.replace("{n}", str(n)),
        why=why,
        fix=fix,
    )


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, then by domain, split and check; a stable order."""
    return sorted(findings, key=lambda f: (_ORDER[f.severity], f.domain, f.split, f.check, f.rows))
