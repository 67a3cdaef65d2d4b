"""What every augmentation is: attempts at further training rows, each from one row and judged by named filters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from residency.core.errors import UserError
from residency.core.types import Example, Row, RowKind, Split
from residency.domains.row_template import RowTemplate

__all__ = ["PROVENANCE", "Asked", "Attempt", "Augmentation", "BaseModel", "Material", "is_child", "may_be_kept"]

PROVENANCE = "augmented"
"""Key of `Row.extra` (and `Example.extra`) that tells where a child comes from; no other row has it."""


class BaseModel(Protocol):
    """The pretrained model of a run, before any stage and without its adapter."""

    tokens: int
    """Read and written so far."""

    @property
    def tokenizer(self) -> Any:
        """Of the model."""

    def identity(self) -> Mapping[str, str]:
        """What identifies the model: hashes of weights and tokenizer, precision."""

    def write(self, request: str, *, max_new_tokens: int, temperature: float, seed: int) -> str | None:
        """What the model answers to a request, stripped; `None` if it did not end. A function of its arguments."""

    def nll(self, example: Example) -> tuple[float, ...]:
        """Negative log-likelihood of the supervised tokens of every branch together, in nats."""

    def release(self) -> None:
        """Give its memory back; it is loaded again when it is asked for."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What an augmentation works on.

    Args:
        rows: Training rows of the domain.
        labels: Its labels; empty if it is generative.
        template: How its rows become tokens.
        base: The pretrained model; `None` where nobody has told which one it is.
    """

    rows: tuple[Row, ...]
    labels: tuple[str, ...] = ()
    template: RowTemplate | None = None
    base: BaseModel | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One child that is to be made.

    Args:
        parent: Of this row.
        number: The how many-th of it, from 1.
    """

    parent: Row
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What became of one `Asked`.

    Args:
        prompt: Of the child.
        completion: Of the child; `None` = that of the parent.
        dropped: Name of the filter that drops it; empty = none does.
        score: What the last filter measured, where it measures something.
        own: Whether it is a row of its own and no variant of its parent, whose further columns say nothing of it then.
        more: Further provenance as JSON values.
    """

    prompt: str = ""
    completion: str | None = None
    dropped: str = ""
    score: float | None = None
    own: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)


class Augmentation(ABC):
    """One way to make further training rows.

    Args:
        per_row: Children that are asked for of every training row; `max_share` of the domain bounds them.
        seed: Of all draws; not the run's, so that runs of all seeds learn from the same rows.
        replay_augmented: Whether memories of later stages may keep the children.
        split: Which rows are augmented; any other than the training rows is refused.

    Raises:
        UserError: A split that is scored, or less than one child.
    """

    name: ClassVar[str]
    """Part of a child's id."""
    kinds: ClassVar[frozenset[RowKind]] = frozenset({"completion", "labelled", "prompt", "pair", "unpaired"})
    """Of rows that it can be a parent of."""
    needs_base: ClassVar[bool] = False
    """Whether the pretrained model of the run writes."""
    kept_in_cache: ClassVar[bool] = False
    """Whether attempts are written down, because a model made them."""
    tokens: int = 0
    """Read and written so far by models of its own."""

    def __init__(
        self, *, per_row: int = 1, seed: int = 0, replay_augmented: bool = False, split: Split = "train"
    ) -> None:
        if split != "train":
            raise UserError(
                f"augment: {type(self).__name__} of the {split} split",
                why="scores would be taken on rows that nobody wrote, and rows of one parent would meet in two splits",
                fix="augment the training rows: leave split out",
            )
        if per_row < 1:
            raise UserError(
                f"augment: {type(self).__name__} with per_row={per_row}",
                why="it is the number of children that are asked for of every training row",
                fix="give 1 or more, or leave the method out",
            )
        self.per_row, self.seed, self.replay_augmented = per_row, seed, replay_augmented

    @abstractmethod
    def attempts(self, asked: Sequence[Asked], material: Material) -> Iterator[Attempt]:
        """One attempt per child that is asked for, in order: a function of the options, the rows and the model.

        Raises:
            UserError: Something that it needs is missing.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON values that decide, with the rows and the base, what it makes: options, digests of files."""

    def check(self, material: Material) -> None:
        """Whether these rows can have children of this kind.

        Raises:
            UserError: They cannot.
        """
        other = next((row for row in material.rows if row.kind not in self.kinds or row.messages), None)
        if other is not None:
            raise UserError(
                f"augment: {type(self).__name__}, and row {other.id!r} is of kind {other.kind}",
                why=f"only rows of these kinds, with a prompt in one piece, can have children: "
                f"{', '.join(sorted(self.kinds))}",
                fix="leave the method out for this domain",
            )
        if self.needs_base and material.base is None:
            raise UserError(
                f"augment: {type(self).__name__} without a model",
                why="it is the pretrained model of the run that writes the rows",
                fix="read the domain in a run (`residency fit`), or leave the method out",
            )


def is_child(given: Row | Example) -> bool:
    """Whether a row, or the example of it, was made by an augmentation."""
    return isinstance(given.extra.get(PROVENANCE), Mapping)


def may_be_kept(example: Example) -> bool:
    """Whether a memory of later stages may keep an example: those of files, and children where their method says so."""
    return not is_child(example) or bool(example.extra[PROVENANCE].get("replay"))
