"""Scores of single examples. Pure functions; `residency.engine.scoring.evaluation` runs the model for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from residency.core.errors import UserError

__all__ = ["SCORERS", "Scorer", "check_scorers", "exact_match", "label_is_best", "rouge_l"]


@dataclass(frozen=True, slots=True)
class Scorer:
    """What a score is.

    Args:
        higher_is_better: Orientation.
        unit: For tables and axes.
        needs: `likelihood` (one pass over completions and labels), `generation` (greedy decoding), or `adapter` (an
            adapter adds it by itself; nobody asks for it).
        per_token: Whether a mean over rows weighs them by their completion tokens.
    """

    higher_is_better: bool
    unit: str
    needs: str
    per_token: bool = False


SCORERS = {
    "nll": Scorer(False, "nats per completion token", "likelihood", per_token=True),
    "accuracy": Scorer(True, "share of rows whose own label is the most likely one", "likelihood"),
    "exact_match": Scorer(True, "share of rows written exactly", "generation"),
    "rougeL": Scorer(True, "ROUGE-L F1, 0 to 1", "generation"),
    "nll_routed": Scorer(False, "nats per completion token, domain not told", "adapter", per_token=True),
    "nll_newest": Scorer(False, "nats per completion token under the newest adapter", "adapter", per_token=True),
    "routing_error": Scorer(False, "share of rows routed to another domain's adapter", "adapter"),
}


def check_scorers(names: Sequence[str], *, where: str) -> None:
    """Known names only.

    Raises:
        UserError: Naming the scorers there are.
    """
    choices = [name for name, scorer in SCORERS.items() if scorer.needs != "adapter"]
    unknown = [name for name in names if name not in choices]
    if unknown:
        raise UserError(
            f"{where}.scorers has {unknown}",
            why="there is no such scorer",
            fix=f"choose from {', '.join(choices)}",
        )


def label_is_best(branch_nll: Tensor) -> bool:
    """Whether the true completion (branch 0) is strictly the most likely of all labels.

    Args:
        branch_nll: (1 + alternatives,) negative log-likelihood of each whole label, summed over its tokens, the end
            token included, so that labels compete as complete answers and length needs no correction.
    """
    return bool((branch_nll[0] < branch_nll[1:]).all())


def exact_match(prediction: str, target: str) -> float:
    """1 if both are equal up to white space, else 0; a part of the answer is no answer."""
    return float(prediction.split() == target.split())


def rouge_l(predictions: Sequence[str], targets: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of each pair (Lin 2004), by torchmetrics."""
    from torchmetrics.functional.text.rouge import rouge_score

    scores = []
    for prediction, target in zip(predictions, targets, strict=True):
        value = rouge_score(prediction, target, rouge_keys="rougeL")["rougeL_fmeasure"]
        scores.append(float(torch.as_tensor(value)))
    return scores
