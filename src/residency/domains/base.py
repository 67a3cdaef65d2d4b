"""What every domain is: rows of text in splits that do not leak, a template, and the scores that suit it."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

from residency.core.errors import UserError
from residency.core.types import Kind, Row, RowKind, Split
from residency.domains.augmentation.base import Augmentation, BaseModel, Material
from residency.domains.augmentation.children import make_children
from residency.domains.augmentation.written import written
from residency.domains.chat import Chat
from residency.domains.left_out import LeftOut
from residency.domains.row_template import RowTemplate
from residency.domains.row_values import row_of, row_values
from residency.domains.splits import check_splits, drop_ambiguous, hash_order, split_by_group
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
        augment: Further training rows made of those that there are (`residency.domains.augmentation`).
        max_share: Largest share of such rows among all training rows, above 0 and below 1.

    Raises:
        UserError: A limit is negative, or the share is none.
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
        augment: list[Augmentation] | None = None,
        max_share: float = 0.5,
    ) -> None:
        self._template = template
        self.given: dict[Split, int] = {}
        """Rows that were read, before the limits; empty until then, and where another process has read them."""
        self.unread: list[LeftOut] = []
        """What the files hold that makes no row, found when they are read."""
        self.limits: dict[Split, int | None] = {"train": max_train, "validation": max_validation, "test": max_test}
        self._asked = None if scorers is None else list(scorers)
        self.augment, self.max_share = list(augment or []), max_share
        self.augmented: list[dict[str, Any]] = []
        """What each method of `augment` made (`Made`); empty until the training rows are asked for."""
        self.base: BaseModel | None = None
        """The pretrained model of the run, for methods of `augment` that it writes."""
        self.scored_rows: Callable[[], Iterable[Row]] | None = None
        """Rows of the whole stream that no child may resemble; outside of a stream, those of the domain."""
        for split in (split for split, limit in self.limits.items() if limit is not None and limit < 0):
            raise UserError(
                f"max_{split} = {self.limits[split]}",
                why="a split cannot have less than no rows",
                fix=f"give max_{split} a number of rows, or null for all of them",
            )
        if not 0 < max_share < 1:
            raise UserError(
                f"max_share = {max_share}",
                why="it is the largest share of training rows that `augment` makes, of all training rows",
                fix="give 0.5, or leave it out",
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
        if not checked:
            return self._unchecked[split]
        # Rows that are scored have no children, and no model is needed to read them.
        return self._training if split == "train" else self._rows[split]

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
        for split, rows in self._whole().items():
            for row in rows:
                digest.update(_line([split, *row_values(row)]))
        return digest.hexdigest()

    def give_rows(self) -> dict[Split, list[list[Any]]]:
        """The rows of every split as JSON values, for another process."""
        return {split: [row_values(row) for row in rows] for split, rows in self._whole().items()}

    def take_rows(self, given: Mapping[Split, Sequence[Sequence[Any]]]) -> None:
        """Use the rows that `give_rows` gave, instead of reading them again."""
        rows = {split: tuple(map(row_of, part)) for split, part in given.items()}
        self.__dict__.update(_unchecked=rows, _rows=rows, _training=rows["train"])
        self.__dict__.pop("_fingerprint", None)

    def count_given(self, splits: Mapping[Split, Sequence[Row]]) -> dict[Split, int]:
        """Rows there are before the limits."""
        return {split: len(rows) for split, rows in splits.items()}

    @cached_property
    def _rows(self) -> dict[Split, tuple[Row, ...]]:
        check_splits(self._unchecked, source=self.source, limits=self.limits)
        return self._unchecked

    @cached_property
    def _training(self) -> tuple[Row, ...]:
        """The training rows, and behind them the children that `augment` makes of them."""
        rows = self._rows["train"]
        if not self.augment:
            return rows
        material = Material(rows=rows, labels=self.labels(), template=self.template, base=self.base)
        scored = (self.scored_rows or self.unchecked_scored)()
        children, made = make_children(self.augment, material, scored, max_share=self.max_share, write=written)
        self.augmented = [one.plain() for one in made]
        if "train" in self.given:
            self.given["train"] += len(children)
        return (*rows, *children)

    def _whole(self) -> dict[Split, tuple[Row, ...]]:
        return {split: self.rows(split) for split in self._rows}

    def unchecked_scored(self) -> Iterable[Row]:
        """Its rows that are scored, as they were read."""
        return (*self.rows("validation", checked=False), *self.rows("test", checked=False))

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


def _line(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"
