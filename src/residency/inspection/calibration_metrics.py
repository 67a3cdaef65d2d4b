"""Does the model know what it does not know (E20)? Over answer tokens only. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Calibration", "TokenAnswers", "brier", "calibration", "expected_calibration_error", "token_answers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Calibration of the next-token predictions at the answer tokens of a data set; lower is better for all.

    Args:
        ece: Expected calibration error, 0 to 1.
        brier: Brier score over the vocabulary, 0 to 2.
        nll: Nats per token.
        tokens: Number of tokens.
    """

    ece: float
    brier: float
    nll: float
    tokens: int


def expected_calibration_error(confidence: Tensor, correct: Tensor, *, bins: int = 15) -> float:
    """ECE = Σ_b (n_b/n) |mean correct_b - mean confidence_b| over bins of equal mass (Nguyen and O'Connor 2015).

    Bins of equal width leave most bins of a confident model empty. With fewer tokens than bins, a bin has one token.

    Args:
        confidence: (M,) probability of the predicted token.
        correct: (M,) whether it is the right one.
        bins: Number of bins.
    """
    if confidence.shape != correct.shape or confidence.dim() != 1 or bins < 1:
        raise ValueError(f"{tuple(confidence.shape)} confidences and {tuple(correct.shape)} answers in {bins} bins")
    n = confidence.numel()
    if n == 0:
        return math.nan
    # Equal confidences must not be cut apart by whether they are right, so ties keep their order.
    order = confidence.argsort(stable=True)
    gap = correct[order].double() - confidence[order].double()
    return sum(abs(float(part.sum())) for part in gap.tensor_split(min(bins, n))) / n


def brier(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Σ_v (p_v - [v = target])² = Σ p² - 2 p_target + 1 of every token (Brier 1950).

    Args:
        probabilities: (M, V).
        targets: (M,).

    Returns:
        (M,) in [0, 2].
    """
    hit = probabilities.gather(-1, targets[:, None])[:, 0]
    return probabilities.square().sum(-1) - 2 * hit + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenAnswers:
    """What calibration needs of (M, V) logits: four numbers per token.

    Args:
        confidence: (M,) probability of the predicted token.
        correct: (M,) whether it is the right one.
        brier: (M,) Brier score.
        nll: (M,) nats.
    """

    confidence: Tensor
    correct: Tensor
    brier: Tensor
    nll: Tensor


def token_answers(logits: Tensor, targets: Tensor) -> TokenAnswers:
    """Sum up one batch.

    Args:
        logits: (M, V) at the answer tokens.
        targets: (M,).
    """
    log_p = torch.log_softmax(logits.detach().double(), -1)
    confidence, predicted = log_p.max(-1)
    nll = -log_p.gather(-1, targets[:, None])[:, 0]
    scores = brier(log_p.exp(), targets)
    return TokenAnswers(confidence=confidence.exp(), correct=predicted == targets, brier=scores, nll=nll)


def calibration(answers: Sequence[TokenAnswers], *, bins: int = 15) -> Calibration:
    """All three of one data set.

    Args:
        answers: Its batches.
        bins: Of the ECE.
    """
    confidence, correct, scores, nll = (
        torch.cat([getattr(a, name) for a in answers]) for name in ("confidence", "correct", "brier", "nll")
    )
    return Calibration(
        ece=expected_calibration_error(confidence, correct, bins=bins),
        brier=float(scores.mean()),
        nll=float(nll.mean()),
        tokens=nll.numel(),
    )
