"""What a scorer is: one answer of a model, judged. Pure; `residency.engine.scoring` runs the model for them."""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Literal

from residency.core.types import Row

__all__ = ["Answer", "LabelScore", "ScoreInfo", "Scorer", "references"]

Needs = Literal["likelihood", "generation", "both"]
Labels = Literal["none", "best", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreInfo:
    """What a score is, for tables, axes and orientation.

    Args:
        higher_is_better: Orientation.
        unit: One line.
        per_token: Whether a mean over rows weighs them by their completion tokens.
    """

    higher_is_better: bool
    unit: str
    per_token: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScore:
    """The likelihood of one label after one prompt.

    Args:
        nll: Nats of the whole label, end token included.
        tokens: Of the label, end token included.
        bytes: UTF-8 bytes of the label as text.
    """

    nll: float
    tokens: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model did with one row; what no scorer of the domain asks for is not computed.

    Args:
        nll: Nats of the row's own completion, summed over its tokens, end token included.
        tokens: Supervised tokens of the completion, end token included.
        best: Whether the row's own label is strictly the most likely one; `None` without other labels.
        labels: {label: its likelihood} of every label of the domain, the row's own included; of a pair, of its two
            answers; `labels = "all"` only.
        text_nll: Nats of the completion without its end token.
        text_bytes: UTF-8 bytes that those tokens spell.
        rewards: {token: what a reward model gives the chosen answer and the rejected one of a pair}.
        text: What was generated, stripped; `None` where nothing was.
        ended: Whether the generation stopped by itself and not at the limit.
    """

    nll: float = math.nan
    tokens: int = 0
    best: bool | None = None
    labels: Mapping[str, LabelScore] = field(default_factory=dict)
    text_nll: float = math.nan
    text_bytes: int = 0
    rewards: Mapping[str | None, tuple[float, float]] = field(default_factory=dict)
    text: str | None = None
    ended: bool = True


class Scorer(ABC):
    """One way to judge answers. A subclass is a frozen dataclass, so that its options are its identity.

    A new scorer is one class in a file of this package (or in a package of yours): its short names need no list.

    Attributes:
        names: {short name: options} under which a config may ask for it; the first is the plain form.
        higher_is_better: Orientation.
        unit: One line for tables and axes.
        needs: `likelihood` (completions and labels are read), `generation` (greedy decoding) or `both`.
        labels: Which likelihoods of labels it reads: `none`; `best`: only whether the own label wins, which needs a
            fraction of the tokens; `all`.
        text_likelihood: Whether it reads `Answer.text_nll` (one more pass over the completions).
        rewards: Whether it reads `Answer.rewards` (one more pass over pairs).
        whole_column: Whether a column's score is one of all its answers together and no mean of rows' scores (corpus
            BLEU); what it gives the rows has that score as its mean (`residency.scorers.corpus.linearised`).
        libraries: Packages whose version decides the score; part of the key of an evaluation.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str]
    needs: ClassVar[Needs]
    labels: ClassVar[Labels] = "none"
    text_likelihood: ClassVar[bool] = False
    rewards: ClassVar[bool] = False
    whole_column: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Sequence[float]:
        """(rows,) scores; a function of its arguments alone.

        Args:
            rows: What was asked.
            answers: (rows,) what the model did. Of a generation scorer every `text` is there, of one that reads labels
                every `best` or `labels`.
        """

    @property
    def name(self) -> str:
        """Of the score, in records, tables and search: the short name with these options, else the class's own name."""
        mine = json.dumps(self.options(), sort_keys=True)  # a list of a config is a tuple of a default
        for name, options in self.names.items():
            if json.dumps(type(self)(**options).options(), sort_keys=True) == mine:
                return name
        return type(self).__name__.lower()

    @property
    def compares(self) -> bool:
        """Whether it reads the row's completion; rows of prompts alone have none."""
        return True

    def weights(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Sequence[int]:
        """(rows,) weights of the rows in a column's mean; 1 by default."""
        return [1] * len(rows)

    def options(self) -> dict[str, Any]:
        """What it was made from, as plain values."""
        if dataclasses.is_dataclass(self):
            return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse rows that it cannot judge, before a model is loaded.

        Raises:
            UserError: In subclasses.
        """

    def info(self) -> ScoreInfo:
        """Orientation and unit."""
        return ScoreInfo(higher_is_better=self.higher_is_better, unit=self.unit)

    def versions(self) -> dict[str, str]:
        """{library: version} of what decides its scores."""
        return {name: _version(name) for name in self.libraries}


def references(row: Row) -> tuple[str, ...]:
    """Every right answer of a row; a scorer of texts takes the best one."""
    return (row.completion, *getattr(row, "references", ()))


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
