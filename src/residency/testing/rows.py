"""One row per plug-in: how to make it, and what it promises; every property of its kind runs on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from residency.adapters import Adapter
from residency.domains import Domain
from residency.domains.augmentation import Augmentation
from residency.metrics.definitions.base import About, Scores
from residency.mitigations import Mitigation
from residency.objectives import Objective
from residency.scorers.base import Answer, Scorer

__all__ = ["AdapterRow", "AugmentationRow", "DomainRow", "MetricRow", "MitigationRow", "ObjectiveRow", "ScorerRow"]


@dataclass(frozen=True, kw_only=True)
class AdapterRow:
    """What an adapter promises.

    Args:
        make: A fresh adapter.
        identity: Whether the attached model equals the pretrained one: bit for bit, up to rounding, or not at all (then
            the adapter provides `reference`, which row 0 is scored with).
        loads_with: Which library reads what `export` writes.
        average: Largest relative error of `load_weights(weights(state))`.
        merge: Largest error of a merged model's logits.
        still: Substrings of parameter names that are declared as trainable and need not move in a stage.
        loading: Options of the backbone (dtype, quantisation).
        trainer: Options of the Trainer that differ.
        lr: Learning rate at which four steps show.
        seeded: Whether another seed must give another start.
        repeats: Whether beginning a stage twice gives the same bits; if not, the same up to rounding.
    """

    make: Callable[[], Adapter]
    identity: Literal["exact", "close", "none"] = "exact"
    loads_with: Literal["peft", "transformers", "residency"] = "peft"
    average: float = 1e-5
    merge: float = 2e-4
    still: tuple[str, ...] = ()
    loading: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 1e-2
    seeded: bool = False
    repeats: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """What `tiny_runs.train` and `tiny_runs.make_module` take for this row."""
        return {"loading": self.loading, "lr": self.lr}


@dataclass(frozen=True, kw_only=True)
class MitigationRow:
    """A mitigation that acts on the tiny stream of two domains with two and three steps, and the same at strength 0.

    Args:
        make: Acts: the weights after the second stage differ from those without it. Whether the first stage does is
            read off `touches_training` and `changes_weights`.
        off: Changes no bit.
        refuses: What the refusal says of adapters that it cannot work with for another reason than their capabilities;
            nothing where it works.
        idle: Adapter rows with which it is permitted and has nothing to do on that stream.
        conditional: Acts only where something arises (a gradient that would hurt an old domain, an outlier), which need
            not happen with every adapter in five steps.
    """

    make: Callable[[], Mitigation]
    off: Callable[[], Mitigation]
    refuses: Callable[[Adapter], str] = lambda adapter: ""
    idle: tuple[str, ...] = ()
    conditional: bool = False


@dataclass(frozen=True, kw_only=True)
class ObjectiveRow:
    """An objective on eight tiny rows of the kind that it reads (`residency.testing.objective_rows`).

    Args:
        make: A fresh one; acts on a random model.
    """

    make: Callable[[], Objective]


@dataclass(frozen=True, kw_only=True)
class ScorerRow:
    """A scorer and answers whose order it must see.

    Args:
        make: A fresh scorer.
        prompt: What is asked.
        completion: The right answer.
        rejected: The other answer of a pair, where it reads pairs.
        good: An answer that deserves the best score.
        bad: One that deserves less.
        best: The best score.
    """

    make: Callable[[], Scorer]
    prompt: str = "the source text"
    completion: str = "the cat sat on the mat"
    rejected: str = ""
    good: Answer = field(default_factory=lambda: Answer(text="the cat sat on the mat"))
    bad: Answer = field(default_factory=lambda: Answer(text="dogs"))
    best: float = 1.0


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """A metric of a score matrix, as its file defines it.

    Args:
        function: `name(R, *, higher_is_better) -> float` for the (T+1, T) matrix R, row 0 before any training.
        about: The file's `ABOUT`.
        references: Scores of other models on four domains that the function takes besides R, by argument.
        ratio: It divides scores: a loss is no score with its sign turned.
    """

    function: Callable[..., float]
    about: About
    references: Mapping[str, Scores] = field(default_factory=dict)
    ratio: bool = False


@dataclass(frozen=True, kw_only=True)
class DomainRow:
    """A reader and what it needs.

    Args:
        make: A fresh reader; it is given an empty folder, for the files that it is to read.
        missing: Why it cannot be read here (the reason of the skip), nothing where it can.
    """

    make: Callable[[Path], Domain]
    missing: Callable[[], str] = lambda: ""


@dataclass(frozen=True, kw_only=True)
class AugmentationRow:
    """A way to make training rows, on four rows about a physician, a car and a place each.

    Args:
        make: A fresh one; it is given an empty folder, for files that it is to read.
        answer: What the pretrained model writes to a request, where it needs one.
        accepted: Whether some attempts pass its filters; a random translation model makes none that do.
    """

    make: Callable[[Path], Augmentation]
    answer: Callable[[str], str | None] | None = None
    accepted: bool = True
