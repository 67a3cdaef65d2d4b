"""What a run is apart from model and data, and what can be checked of it at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from residency.backbones.base import Backbone
from residency.core.errors import UserError
from residency.core.types import Split
from residency.domains.base import Domain
from residency.domains.stream_data import StreamData
from residency.engine.scoring.settings import EvaluationSettings
from residency.engine.stage_overrides import StageOverrides
from residency.scorers.base import ScoreInfo

__all__ = ["StreamSettings", "check_lengths", "check_stream"]


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """What a run is apart from model and data.

    Args:
        cell: Name of the run.
        seed: Of everything random.
        axes: Place in a study.
        checkpoint_every_n_steps: Optimizer steps between two in-stage checkpoints; 0 = none.
        evaluation: How states are scored.
        split: Which rows are scored after every stage.
        store: Folder where runs share stages and scores; `None` = not shared. Needs the resolved config.
        stage_tokens: Training tokens per stage instead of steps: the budget that streams of long and short rows share.
        frozen: Train nothing: every row of the score matrix is that of the pretrained model.
        stages: What the stages of single domains do otherwise, by domain.
    """

    cell: str
    seed: int = 0
    axes: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_every_n_steps: int = 50
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    split: Split = "test"
    store: Path | None = None
    stage_tokens: int | None = None
    frozen: bool = False
    stages: Mapping[str, StageOverrides] = field(default_factory=dict)


def check_stream(data: StreamData, *, batch_sizes: Iterable[int] = ()) -> None:
    """Everything about the data that can be wrong, before a model is loaded.

    Args:
        data: Domains and probes.
        batch_sizes: Of stages that have their own.

    Raises:
        UserError: See the message.
    """
    known: dict[str, tuple[str, ScoreInfo]] = {}
    for name, domain in data.columns.items():
        for scorer, info in _scorers(domain, name).items():
            first, other = known.setdefault(scorer, (name, info))
            if info.higher_is_better != other.higher_is_better:
                raise UserError(
                    f"the score {scorer!r} of {first} and of {name}",
                    why="of one it is better to be high, of the other to be low: they are no columns of one matrix",
                    fix="give one of them another name",
                )
    data.check(batch_sizes=batch_sizes)
    for name, domain in data.columns.items():
        _check_rows(domain, name)


def _scorers(domain: Domain, name: str) -> dict[str, ScoreInfo]:
    with named(name):
        return {scorer: one.info() for scorer, one in domain.scorers.items()}


def _check_rows(domain: Domain, name: str) -> None:
    """Every scorer can judge the rows of its domain."""
    with named(name):
        rows = [row for split in ("validation", "test") for row in domain.rows(split)]
        bare = next((row for row in rows if not row.completion), None)
        if domain.scorers and rows and not any(row.wanted for row in domain.rows("test")):
            raise UserError(
                "test has no answer that is wanted",
                why="scores are taken on the answers that a model should write",
                fix="put rows with label true into the test file, or set scorers: []",
            )
        for label, scorer in domain.scorers.items():
            if bare is not None and scorer.compares:
                raise UserError(
                    f"scorers has {label!r}, and row {bare.id!r} is a prompt without a completion",
                    why="it compares what the model does with the row's completion",
                    fix="give scored rows a completion, or scorers that need none: json_valid, python_compiles, Regex",
                )
            scorer.check(rows)


@contextmanager
def named(column: str) -> Iterator[None]:
    """What goes wrong inside is told of this domain.

    Raises:
        UserError: The one that was raised inside, with the domain's key before it.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"data.domains.{column}.{error.got}", why=error.why, fix=error.fix) from error


def check_lengths(backbone: Backbone, data: StreamData) -> None:
    """No row is longer than the model reads texts as it was made to.

    Rows are only counted where a template lets them be that long.

    Raises:
        UserError: Naming domain, row, and how long it is.
    """
    most = backbone.longest_text()
    for name, domain in data.columns.items():
        limit = getattr(domain.template, "max_tokens", None)
        if most is None or (limit is not None and limit <= most):
            continue
        known = name in data.order and (longest := data.longest_of_many(name, backbone.tokenizer)) and longest <= most
        splits = [split for split in get_args(Split) if not (known and split == "train")]
        rows = [(split, row) for split in splits for row in domain.rows(split)]
        for split, row in rows:
            example = domain.template.encode(backbone.tokenizer, domain=name, row=row, split=split)
            tokens = len(example)
            # A training row that is too long is left out, or refused, where rows are counted.
            if tokens > most and not example.cut_prompt:
                raise UserError(
                    f"data.domains.{name}: row {row.id!r} has {tokens} tokens, and the model reads {most} tokens",
                    why="it has no positions for more, or positions that change what shorter rows beside it score",
                    fix=f"set template.max_tokens to at most {most}, or choose a model with more positions",
                )
