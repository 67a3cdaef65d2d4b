"""What every domain is: rows of text in splits that do not leak, a template, and the scores that suit it."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, get_args

from residency.core.errors import UserError
from residency.core.types import Example, Kind, Row, RowKind, Split
from residency.domains.chat import Chat
from residency.domains.left_out import LeftOut
from residency.domains.lengths import TooLong
from residency.domains.row_values import row_of, row_values
from residency.domains.template import Template
from residency.scorers.base import Scorer
from residency.scorers.find import scorers_by_name

__all__ = ["Domain", "Kind", "RowTemplate", "Template", "drop_ambiguous", "hash_order", "split_by_group"]

_SCORERS: Mapping[Kind, tuple[str, ...]] = {
    "label": ("nll", "accuracy"),
    "generative": ("nll", "exact_match", "rougeL"),
}


_SCORERS_OF_ROWS: Mapping[RowKind, tuple[str, ...]] = {
    "pair": ("nll", "preference_accuracy"),
    "unpaired": ("nll",),
    "prompt": (),
}
"""Prompts alone have nothing to be compared with; whether an answer is right is for a scorer of its form to say."""


class RowTemplate(Protocol):
    """How rows become tokens: a frozen dataclass, whose fields are part of the domain's fingerprint."""

    @property
    def too_long(self) -> TooLong | None:
        """What happens to rows that are too long; `None` = training rows are left out, up to 1 % of them."""

    def encode(
        self, tokenizer: Any, *, domain: str, row: Row, labels: Sequence[str] = (), split: Split = "train"
    ) -> Example:
        """Turn one row into token ids."""


class Domain(ABC):
    """One named data set: rows in three splits, a template and the scores that suit it.

    A reader declares `kind`, `source`, `licence`, `attribution` and writes `read`; everything else is here.

    Args:
        template: How rows become text and tokens: `plain` (see `Template`), `chat` (see `Chat`), or one of them with
            its options; by default what suits the rows.
        max_train: Rows kept of the training split; null keeps all.
        max_validation: Rows kept of the validation split; null keeps all.
        max_test: Rows kept of the test split; null keeps all.
        scorers: Short names, class paths or scorers (`residency.scorers`); by default nll and accuracy for labels, nll,
            exact_match and rougeL for text, nll and preference_accuracy for pairs, nll (of what is wanted) for unpaired
            answers, none for prompts alone.

    Raises:
        UserError: A limit is negative.
    """

    kind: Kind
    source: str
    licence: str
    attribution: str
    default_scorers: ClassVar[tuple[str, ...]] = ()
    """What a reader scores by default if not what its kind suggests."""
    default_template: ClassVar[Template] = Template(
        max_prompt_tokens=96, max_tokens=128, too_long="truncate", tokenise="apart"
    )
    """What a template leaves open is taken from this one."""

    def __init__(
        self,
        *,
        template: Template | Chat | Literal["plain", "chat"] | None = None,
        max_train: int | None = 2000,
        max_validation: int | None = 48,
        max_test: int | None = 96,
        scorers: list[str | Scorer] | None = None,
    ) -> None:
        self._template = template
        self.given: dict[Split, int] = {}
        """Rows that were read, before the limits; empty until then, and where another process has read them."""
        self.unread: list[LeftOut] = []
        """What the files hold that makes no row, found when they are read."""
        self.limits: dict[Split, int | None] = {"train": max_train, "validation": max_validation, "test": max_test}
        self._asked = None if scorers is None else list(scorers)
        for split in (split for split, limit in self.limits.items() if limit is not None and limit < 0):
            raise UserError(
                f"max_{split} = {self.limits[split]}",
                why="a split cannot have less than no rows",
                fix=f"give max_{split} a number of rows, or null for all of them",
            )

    @cached_property
    def template(self) -> RowTemplate:
        """How rows become tokens. Reads the rows where they decide: conversations go by the chat template."""
        wanted = self._template
        if wanted is None:
            # Not the checked ones: the doctor looks at rows that a run refuses as the model would read them.
            first = self.rows("train", checked=False)[:1]
            wanted = "chat" if any(row.messages for row in first) else "plain"
        if wanted == "chat":
            wanted = Chat()
        return wanted if isinstance(wanted, Chat) else _filled(self.default_template, wanted)

    def under(self, root: Any) -> Domain:
        """The same domain with its relative paths taken from a folder (Path); itself, if it reads no such files."""
        return self

    @abstractmethod
    def read(self) -> Mapping[Split, Sequence[Row]]:
        """All rows of every split, best in an order that makes the first n a fair sample (see `hash_order`)."""

    @cached_property
    def scorers(self) -> dict[str, Scorer]:
        """{name of the score: scorer}.

        Raises:
            UserError: An unknown scorer, or two of one name.
        """
        if self._asked is not None:
            return scorers_by_name(self._asked, where="scorers")
        first = self.rows("train", checked=False)[:1]
        of_rows = _SCORERS_OF_ROWS.get(first[0].kind if first else "completion", _SCORERS[self.kind])
        return scorers_by_name(self.default_scorers or of_rows, where="scorers")

    def rows(self, split: Split, *, checked: bool = True) -> tuple[Row, ...]:
        """The rows of a split after its limit; read and checked once.

        Args:
            split: Which.
            checked: If not, the rows as they were read, also where scores on them would mean nothing: for what looks
                for the reasons.

        Raises:
            UserError: No row to train or to test on, an id twice in a split, or training rows that return in the test.
        """
        return (self._rows if checked else self._unchecked)[split]

    def labels(self) -> tuple[str, ...]:
        """The distinct completions of all splits, sorted; empty if the domain is generative."""
        if self.kind != "label":
            return ()
        return tuple(sorted({row.completion for rows in self._rows.values() for row in rows}))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything the model can see: kind, template, every row of every split, in order."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        template: Any = self.template
        digest = hashlib.sha256(_line({"kind": self.kind, "template": asdict(template)}))
        for split, rows in self._rows.items():
            for row in rows:
                digest.update(_line([split, *row_values(row)]))
        return digest.hexdigest()

    def give_rows(self) -> dict[Split, list[list[Any]]]:
        """The rows of every split as JSON values, for another process."""
        return {split: [row_values(row) for row in rows] for split, rows in self._rows.items()}

    def take_rows(self, given: Mapping[Split, Sequence[Sequence[Any]]]) -> None:
        """Use the rows that `give_rows` gave, instead of reading them again."""
        rows = {split: tuple(map(row_of, part)) for split, part in given.items()}
        self.__dict__.update(_unchecked=rows, _rows=rows)
        self.__dict__.pop("_fingerprint", None)

    def count_given(self, splits: Mapping[Split, Sequence[Row]]) -> dict[Split, int]:
        """Rows there are before the limits."""
        return {split: len(rows) for split, rows in splits.items()}

    @cached_property
    def _rows(self) -> dict[Split, tuple[Row, ...]]:
        _check(self, self._unchecked)
        return self._unchecked

    @cached_property
    def _unchecked(self) -> dict[Split, tuple[Row, ...]]:
        read = self.read()
        splits: dict[Split, Sequence[Row]] = {split: read.get(split, ()) for split in get_args(Split)}
        self.given = self.count_given(splits)
        return {split: tuple(rows[: self.limits[split]]) for split, rows in splits.items()}


def _filled(default: Template, wanted: Template | Literal["plain"]) -> Template:
    """A template with what it leaves open taken from the default."""
    if wanted == "plain":
        return default
    open_fields = {f.name: getattr(default, f.name) for f in fields(Template) if getattr(wanted, f.name) is None}
    return replace(wanted, **open_fields)


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


def hash_order(rows: Iterable[Row], *, salt: str = "residency") -> list[Row]:
    """Rows in the order of the SHA-256 of salt + id: the first n are a sample that no sorting of the source biases."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{salt}{row.id}".encode()).digest())


def split_by_group(
    rows: Iterable[Row], *, validation: float = 0.1, test: float = 0.1, salt: str = "residency"
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
        digest = hashlib.sha256(f"{salt}{row.group or row.id}".encode()).digest()
        share = int.from_bytes(digest[:6], "big") / 2**48
        splits["test" if share < test else "validation" if share < test + validation else "train"].append(row)
    return splits


def _check(domain: Domain, splits: Mapping[Split, Sequence[Row]]) -> None:
    """What must hold for scores to mean something."""
    for split, rows in splits.items():
        if not rows and split != "validation":
            raise UserError(
                f"no {split} rows from {domain.source} (max_{split} = {domain.limits[split]})",
                why="a domain needs at least one row to train on and one to test on",
                fix=f"add rows, or raise max_{split}",
            )
        twice = [row_id for row_id, times in Counter(row.id for row in rows).items() if times > 1]
        if twice:
            raise UserError(
                f"{len(twice)} ids more than once in {split} of {domain.source}, e.g. {twice[0]!r}",
                why="scores are stored per id",
                fix="give every row its own id, or none",
            )
    _check_leak(domain, splits, "prompt", lambda row: _normal(row.prompt))
    _check_leak(domain, splits, "group", lambda row: row.group)


def _check_leak(domain: Domain, splits: Mapping[Split, Sequence[Row]], what: str, key: Callable[[Row], str]) -> None:
    trained = {key(row) for row in splits["train"]} - {""}
    shared = [row for row in splits["test"] if key(row) in trained]
    if shared:
        raise UserError(
            f"{len(shared)} test rows of {domain.source} share their {what} with a training row, "
            f"e.g. row {shared[0].id!r}: {getattr(shared[0], what)[:80]!r}",
            why="the test would measure what was memorised, not what was learnt",
            fix=f"keep all rows of one {what} in one split",
        )


def _normal(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def _line(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"
