"""Losses of pairs of answers, one preferred to the other. Pure functions of sums of log-probabilities.

    ℓ   log π(answer | prompt), summed over the answer's tokens, end token included, in nats
    n   its number of tokens,  ℓ̄ = ℓ / n
    Δ   ℓ - ℓ_reference, the log-ratio;  δ = Δ_chosen - Δ_rejected

Everything is (P,), P pairs; a loss of a batch is the sum over its pairs divided by the number of pairs of the step.
At π = reference (Δ = 0): sigmoid and cdpo and robust log 2, hinge 1, ipo 1/(4β²), nca and bco_pair 2 log 2, apo 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "PAIR_LOSSES",
    "REFERENCE_FREE",
    "PairLoss",
    "PairSums",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "cdpo",
    "dpo",
    "hinge",
    "implied_reward",
    "ipo",
    "kto",
    "kto_baseline",
    "nca",
    "odds_ratio",
    "robust",
    "sigmoid_norm",
    "simpo",
    "ties_half",
]

PairLoss = Literal[
    "sigmoid",
    "cdpo",
    "robust",
    "hinge",
    "ipo",
    "sigmoid_norm",
    "nca",
    "bco_pair",
    "apo_zero",
    "apo_down",
    "simpo",
    "cpo",
    "orpo",
]
REFERENCE_FREE: frozenset[PairLoss] = frozenset({"simpo", "cpo", "orpo"})

_LEAST = 1e-7  # nats below 0: where a mean log-probability is rounded to 0, its odds would be infinite


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSums:
    """What is known of P pairs.

    Args:
        chosen: (P,) ℓ of the preferred answers.
        rejected: (P,) ℓ of the others.
        chosen_tokens: (P,) their numbers of tokens.
        rejected_tokens: (P,).
        reference_chosen: (P,) ℓ under the reference; zeros without one.
        reference_rejected: (P,).
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """Δ of the chosen answers."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """Δ of the rejected answers."""
        return self.rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        """δ."""
        return self.chosen_ratio - self.rejected_ratio


def dpo(pairs: PairSums, *, beta: float) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7): -log σ(β δ). Gradient by ℓ_chosen: -β σ(-β δ)."""
    return -F.logsigmoid(beta * pairs.margin)


def cdpo(pairs: PairSums, *, beta: float, smoothing: float) -> Tensor:
    """Conservative DPO (Mitchell 2023): a share ε of the labels is taken to be flipped; at ε = ½ symmetric in δ."""
    z = beta * pairs.margin
    return -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)


def robust(pairs: PairSums, *, beta: float, smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, eq. 12), unbiased where a share ε < ½ of the labels is flipped.

    Unbounded below: about -ε β δ / (1 - 2 ε) for large δ.
    """
    z = beta * pairs.margin
    return (-(1 - smoothing) * F.logsigmoid(z) + smoothing * F.logsigmoid(-z)) / (1 - 2 * smoothing)


def hinge(pairs: PairSums, *, beta: float) -> Tensor:
    """SLiC's hinge (Zhao et al. 2023) on log-ratios, as TRL has it: max(0, 1 - β δ)."""
    return (1 - beta * pairs.margin).relu()


def ipo(pairs: PairSums, *, beta: float) -> Tensor:
    """Identity preference optimisation (Azar et al. 2023, eq. 17), with means over tokens as its authors intend."""
    per_token = pairs.chosen_ratio / pairs.chosen_tokens - pairs.rejected_ratio / pairs.rejected_tokens
    return (per_token - 1 / (2 * beta)).square()


def sigmoid_norm(pairs: PairSums, *, beta: float) -> Tensor:
    """Length-normalised DPO (Lambert et al. 2024): -log σ(β (Δ_c / n_c - Δ_r / n_r)); wants β of about 5."""
    per_token = pairs.chosen_ratio / pairs.chosen_tokens - pairs.rejected_ratio / pairs.rejected_tokens
    return -F.logsigmoid(beta * per_token)


def nca(pairs: PairSums, *, beta: float) -> Tensor:
    """Noise contrastive alignment (Chen et al. 2024) of a pair: holds the chosen answer up."""
    c, r = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r)


def bco_pair(pairs: PairSums, *, beta: float) -> Tensor:
    """Binary classifier optimisation (Jung et al. 2024) without its running mean, as TRL's `bco_pair`."""
    return -F.logsigmoid(beta * pairs.chosen_ratio) - F.logsigmoid(-beta * pairs.rejected_ratio)


def apo_zero(pairs: PairSums, *, beta: float) -> Tensor:
    """Anchored preference optimisation (D'Oosterlinck et al. 2024): chosen up, rejected down."""
    return 1 - (beta * pairs.chosen_ratio).sigmoid() + (beta * pairs.rejected_ratio).sigmoid()


def apo_down(pairs: PairSums, *, beta: float) -> Tensor:
    """APO-down: both down, the rejected one further."""
    return (beta * pairs.chosen_ratio).sigmoid() + 1 - (beta * pairs.margin).sigmoid()


def simpo(pairs: PairSums, *, beta: float, gamma: float) -> Tensor:
    """SimPO (Meng et al. 2024, eq. 6): -log σ(β (ℓ̄_c - ℓ̄_r) - γ), without a reference. Paper: β 2 to 2.5."""
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def cpo(pairs: PairSums, *, beta: float) -> Tensor:
    """Contrastive preference optimisation (Xu et al. 2024) without its likelihood term: -log σ(β (ℓ_c - ℓ_r))."""
    return -F.logsigmoid(beta * (pairs.chosen - pairs.rejected))


def odds_ratio(pairs: PairSums) -> Tensor:
    """ORPO's second term (Hong et al. 2024, eq. 7): -log σ(log odds_c - log odds_r), odds of the mean token."""
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    return -F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(mean: Tensor) -> Tensor:
    """ℓ̄ - log(1 - e^ℓ̄) for ℓ̄ < 0, stable near 0 and far from it."""
    mean = mean.clamp(max=-_LEAST)
    near = mean > -math.log(2)
    # Both branches get a gradient: each is fed what it can take.
    by_expm1 = (-torch.expm1(torch.where(near, mean, -1.0))).log()
    by_log1p = torch.log1p(-torch.exp(torch.where(near, -1.0, mean)))
    return mean - torch.where(near, by_expm1, by_log1p)


def kto_baseline(mismatched_ratio: Tensor) -> Tensor:
    """KTO's z: the mean log-ratio of answers to other rows' prompts, at least 0, without gradient (a scalar).

    Args:
        mismatched_ratio: (B,) Δ(x_i, y_j), j the row before i in the global batch.
    """
    return mismatched_ratio.detach().mean().clamp_min(0)


def kto(ratio: Tensor, desirable: Tensor, baseline: Tensor, *, beta: float, weights: tuple[float, float]) -> Tensor:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, eq. 7).

    Args:
        ratio: (B,) Δ of each row.
        desirable: (B,) bool.
        baseline: z, a scalar without gradient.
        beta: β > 0.
        weights: λ of desirable and of undesirable rows.

    Returns:
        (B,).
    """
    z = beta * (ratio - baseline)
    good, bad = weights[0] * (1 - z.sigmoid()), weights[1] * (1 - (-z).sigmoid())
    return torch.where(desirable, good, bad)


def ties_half(margin: Tensor) -> Tensor:
    """(P,) 1 where the margin is positive, 0 where it is negative, ½ at 0: a start that knows nothing is ½ right."""
    return 0.5 * (1 + margin.sign())


def implied_reward(ratio: Tensor, *, beta: float) -> Tensor:
    """β Δ, the reward that a policy implies (Rafailov et al. 2023, eq. 5), without its prompt's constant."""
    return beta * ratio.detach()


PAIR_LOSSES: dict[PairLoss, Callable[..., Tensor]] = {
    "sigmoid": dpo,
    "cdpo": cdpo,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "sigmoid_norm": sigmoid_norm,
    "nca": nca,
    "bco_pair": bco_pair,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": odds_ratio,
}
assert {*PAIR_LOSSES} == {*get_args(PairLoss)}
