"""What a run is apart from model and data, and what can be checked of it at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from residency.core.types import Split
from residency.domains.stream_data import StreamData
from residency.engine.scoring.evaluation import EvaluationSettings
from residency.scorers.base import check_scorers

__all__ = ["StreamSettings", "check_stream"]


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


def check_stream(data: StreamData) -> None:
    """Everything about the data that can be wrong, before a model is loaded.

    Raises:
        UserError: See the message.
    """
    for name, domain in data.columns.items():
        check_scorers(domain.scorers, where=f"data.domains.{name}")
    data.check()
