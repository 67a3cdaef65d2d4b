"""The doctor: every check on every domain and split, in one stable list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

from residency.core.errors import UserError
from residency.core.types import Row, Split
from residency.domains.base import Domain
from residency.domains.doctor import answers, leaks, row_lengths, tokens
from residency.domains.doctor.finding import Column, Finding, make_finding, sort_findings
from residency.domains.doctor.row_lengths import LengthCounts
from residency.domains.doctor.tokens import Reader

__all__ = ["Diagnosis", "examine", "majority_line", "open_columns"]

_ALL_PAIRS = 200_000  # training rows; beyond, larger splits are looked through for near-duplicates only on request
_FEW_SCORED = 5000  # rows of a split that are compared with any number of training rows
_STATISTICS = 2000  # rows whose tokens are counted for the figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found.

    Args:
        counts: {domain: {split: what the limits do}}; every row is counted.
        figures: {domain: {split: figures}}; left out of the fast form.
        findings: Errors first.
        columns: The rows themselves, of the domains that could be read.
    """

    counts: Mapping[str, Mapping[str, LengthCounts]]
    findings: Sequence[Finding]
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    columns: Sequence[Column] = ()

    def _more(self, name: str, split: str) -> dict[str, Any]:
        """Figures of a split; of the test rows of labels what their most frequent label would get right."""
        found = dict(self.figures.get(name, {}).get(split, {}))
        labels = [column for column in self.columns if column.name == name and column.domain.kind == "label"]
        if split == "test" and labels:
            found["majority"] = majority_line(labels[0])
        return found

    @property
    def errors(self) -> list[Finding]:
        """Those that make scores mean something else than they seem to."""
        return [one for one in self.findings if one.severity == "error"]

    def narrowed(self, refused: Sequence[Finding] = (), domain: str | None = None) -> Diagnosis:
        """With what could not be read beside it, and of one domain where one is named."""
        findings = sort_findings([*refused, *self.findings])
        if domain is None:
            return replace(self, findings=findings)
        return replace(
            self,
            counts={name: value for name, value in self.counts.items() if name == domain},
            findings=[one for one in findings if one.domain in (domain, "")],
            columns=[column for column in self.columns if column.name == domain],
        )

    def plain(self) -> dict[str, Any]:
        """As JSON values, in a stable order, without times."""
        return {
            "schema": 1,
            "domains": {
                name: {split: {**asdict(counts), **self._more(name, split)} for split, counts in splits.items()}
                for name, splits in self.counts.items()
            },
            "findings": [one.plain() for one in self.findings],
        }


def open_columns(
    domains: Mapping[str, Domain], *, probes: frozenset[str] = frozenset(), strict: bool = True
) -> tuple[list[Column], list[Finding]]:
    """Read all domains; one that cannot be read is an error of its own.

    Args:
        domains: By name, probes among them.
        probes: Names of those that are only scored.
        strict: Take the rows that training takes. If not, take them as they are in the files, so that everything that
            a domain would refuse can be found and cleaned at once.
    """
    columns, findings = [], []
    for name, domain in domains.items():
        try:
            splits: dict[Split, Sequence[Row]] = {s: domain.rows(s, checked=strict) for s in get_args(Split)}
        except UserError as error:
            findings.append(
                make_finding(
                    "unreadable", "error", (name, ""), (), of=1, count=1, got=error.got, why=error.why, fix=error.fix
                )
            )
            continue
        columns.append(Column(name=name, domain=domain, splits=splits, given=domain.given, probe=name in probes))
    return columns, findings


def examine(columns: Sequence[Column], reader: Reader, *, near: bool | None = None, figures: bool = True) -> Diagnosis:
    """Look at everything.

    Args:
        columns: Domains and probes.
        reader: The tokenizer and what its model can read.
        near: Look for near-duplicates among all pairs of scored and training rows; `None` = beyond 200,000 training
            rows only for splits of at most 5,000.
        figures: Count tokens and texts of every split.
    """
    counts: dict[str, dict[str, LengthCounts]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    findings: list[Finding] = []
    for column in columns:
        counts[column.name] = {}
        for split, rows in column.splits.items():
            if (rows or column.given.get(split)) and (split != "train" or not column.probe):
                found, prompts, cut = row_lengths.count_lengths(column, split, reader)
                counts[column.name][split] = found
                findings += row_lengths.length_findings(column, split, found, prompts, cut)
                findings += tokens.check_tokens(column, split, reader)
                if figures and rows:
                    numbers.setdefault(column.name, {})[split] = _figures(column, rows, reader)
        findings += _alone(column)
    findings += tokens.check_vocabulary(columns, reader)
    findings += leaks.check_across(columns)
    findings += answers.check_shared_labels(columns)
    trained = sum(len(c.rows("train")) for c in columns if not c.probe)
    if near is not False:
        findings += leaks.check_near(columns, largest=None if near or trained <= _ALL_PAIRS else _FEW_SCORED)
    return Diagnosis(counts=counts, figures=numbers, findings=sort_findings(findings), columns=columns)


def _alone(column: Column) -> Iterator[Finding]:
    """What concerns one domain alone."""
    yield from answers.check_sizes(column)
    yield from answers.check_text(column)
    yield from answers.check_labels(column)
    yield from answers.check_forms(column)
    yield from leaks.check_duplicates(column)
    yield from leaks.check_ids(column)
    for one in column.domain.unread:
        yield make_finding(
            "not_read", "info", (column.name, one.split), (), of=one.of, count=one.count,
            got=f"{{n}} of {one.of} {one.unit} {one.how}", why="no row is made of them",
            fix="nothing has to be done; `columns` renames what was meant",
        )  # fmt: skip
    if not column.probe:
        yield from leaks.check_splits(column)
        yield from leaks.check_groups(column)
    yield from _scorers(column)


def _scorers(column: Column) -> Iterator[Finding]:
    rows = [row for split in ("validation", "test") for row in column.rows(split)]
    try:
        for scorer in column.domain.scorers.values():
            scorer.check(rows)
    except UserError as error:
        yield make_finding(
            "scorer", "error", (column.name, "test"), (), of=1, count=1, got=error.got, why=error.why, fix=error.fix
        )


def majority_line(column: Column) -> float | None:
    """Share of test rows that the most frequent completion of the training rows gets right; `None` without rows."""
    train, test = column.rows("train"), column.rows("test")
    if not train or not test:
        return None
    most = Counter(row.completion for row in train).most_common(1)[0][0]
    return sum(row.completion == most for row in test) / len(test)


def _figures(column: Column, rows: Sequence[Row], reader: Reader) -> dict[str, Any]:
    """Tokens (of the first 2,000 rows), distinct texts, bytes per token."""
    some = rows[:_STATISTICS]
    asked, said = (reader.ids([getattr(row, part) for row in some]) for part in ("prompt", "completion"))
    text = sum(len(row.prompt.encode("utf-8", "replace")) for row in some)
    number = sum(map(len, asked))
    return {
        "prompt_tokens": _quantiles(list(map(len, asked))),
        "completion_tokens": _quantiles(list(map(len, said))),
        "distinct_prompts": len({row.prompt for row in rows}),
        "distinct_completions": len({row.completion for row in rows}),
        "bytes_per_token": round(text / number, 3) if number else None,
    }


def _quantiles(values: list[int]) -> dict[str, int]:
    ordered = sorted(values)
    shares = {"p5": 0.05, "p50": 0.5, "p95": 0.95}
    return {name: ordered[int(q * (len(ordered) - 1))] for name, q in shares.items()} | {"max": ordered[-1]}
