"""Training that diverged is told as such: by the weights that a stage leaves, and by the scores of its state."""

from __future__ import annotations

import math

from torch import nn

from residency.adapters.base import Adapter
from residency.core.errors import UserError
from residency.core.types import Stage
from residency.engine.scoring.row_scores import Evaluation

__all__ = ["check_finite", "check_scores"]


def check_finite(adapter: Adapter, model: nn.Module, stage: Stage) -> None:
    """The weights that a stage leaves are numbers: the loss of its last step was computed before that step.

    Raises:
        UserError: Training diverged.
    """
    bad = [name for name, leaf in adapter.trainable(model).items() if not bool(leaf.isfinite().all())]
    if bad:
        raise UserError(
            f"training diverged at the last step ({stage.steps}) of stage {stage.index + 1} ({stage.domain}): "
            f"{len(bad)} weights are not finite, first {bad[0]!r}",
            why="no score can be computed with them; everything up to the last complete stage is kept",
            fix="lower the learning rate or a mitigation's strength, or set trainer.gradient_clip_val",
        )


def check_scores(scores: Evaluation, *, after: str, steps: int) -> None:
    """Weights may be finite and so large that no likelihood is.

    Args:
        scores: Of one state.
        after: Which one, for the message.
        steps: Optimizer steps of the stream that led to it.

    Raises:
        UserError: A score is no number.
    """
    bad = next((score for score in scores if not math.isfinite(score.value)), None)
    if bad is not None:
        cause = f"training diverged by step {steps} of the stream" if steps else "the model itself computes no number"
        raise UserError(
            f"{bad.scorer} of row {bad.row!r} of {bad.column} is {bad.value} {after}",
            why=f"{cause}; everything up to the last complete stage is kept",
            fix="lower the learning rate, or set trainer.gradient_clip_val"
            if steps
            else "load it in another model.backbone.dtype, or choose another model",
        )
