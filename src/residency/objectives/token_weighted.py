"""Supervised fine-tuning with weights on tokens that the model itself gives: DFT, ASFT, EAFT, TALR.

The denominator stays the number of supervised tokens, so weights below 1 also make steps smaller: compare such methods
at equal learning, not at an equal rate. `nll` in the history is without weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from residency.core.types import Batch, Capability, Example, Stage
from residency.objectives.base import ExampleLosses, Forward, Learner, Objective, refuse, target_nll
from residency.objectives.dataset import own_rows, token_values
from residency.objectives.sft import weighted
from residency.objectives.token_losses import entropy_weights, kl_to_reference, probability_weights, talr_weights

__all__ = ["ASFT", "DFT", "EAFT", "TALR"]


class DFT(Objective):
    """Dynamic fine-tuning (Wu et al. 2025, arXiv:2508.05629): each token weighs its own probability.

    What the model holds for impossible is hardly learnt: on answers of p ≈ 1e-4 per token there is next to no gradient.
    """

    shardable = True

    def losses(self, forward: Forward, batch: Batch, reference: Forward | None) -> ExampleLosses:
        """Σ p_t nll_t, p_t without gradient."""
        nll, logits = target_nll(forward, batch)
        return weighted(nll, probability_weights(nll), batch, logits)


class ASFT(Objective):
    """Anchored supervised fine-tuning (arXiv:2509.23753): DFT and a divergence from the pretrained model.

    The adapter must provide `reference`.

    Args:
        strength: λ of the divergence. 0.1 in the published code, 0.05 in its README.
        direction: `forward` = KL(pretrained ‖ model), as the published code computes it; `reverse`.
    """

    shardable = True
    uses_logits = True
    not_on_classifiers = "the pretrained model has no head that it was trained with, and is no anchor"
    requires: frozenset[Capability] = frozenset({"reference"})

    def __init__(self, *, strength: float = 0.1, direction: Literal["forward", "reverse"] = "forward") -> None:
        if strength < 0:
            raise refuse(
                self, f"strength={strength}", why="it weighs a divergence, which is to be small", fix="give 0 or more"
            )
        self.strength = strength
        self.direction = direction

    def losses(self, forward: Forward, batch: Batch, reference: Forward | None) -> ExampleLosses:
        """Σ p_t nll_t + λ KL_t."""
        if reference is None:
            raise refuse(
                self,
                "an adapter that does not provide the pretrained behaviour",
                why="it keeps near the pretrained model",
                fix="use configs/adapter/lora.yaml, or DFT with configs/mitigation/self_distillation.yaml",
            )
        logits = forward(batch)
        nll = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
        dft = weighted(nll, probability_weights(nll), batch, logits)
        kl = kl_to_reference(logits, reference(batch), direction=self.direction)
        values = dft.values + self.strength * weighted(kl, None, batch, None).values
        return ExampleLosses(values=values, logits=logits, log={**dft.log, "kl": kl.detach().mean()})


class EAFT(Objective):
    """Entropy-adaptive fine-tuning (Diao et al. 2026, arXiv:2601.02151): what the model is sure of is not overwritten.

    Args:
        k: The k likeliest tokens among which the entropy is taken.
        alpha: Exponent of the normalised entropy; 0 = plain supervised fine-tuning.
    """

    shardable = True
    uses_logits = True

    def __init__(self, *, k: int = 20, alpha: float = 1.0) -> None:
        if k < 2 or alpha < 0:
            raise refuse(
                self,
                f"k={k}, alpha={alpha}",
                why="the entropy is taken among at least two tokens, and its exponent is not negative",
                fix="give k: 20 and alpha: 1.0",
            )
        self.k = k
        self.alpha = alpha

    def losses(self, forward: Forward, batch: Batch, reference: Forward | None) -> ExampleLosses:
        """Σ (H_t / ln k)^α nll_t."""
        logits = forward(batch)
        nll = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
        return weighted(nll, entropy_weights(logits, k=self.k, alpha=self.alpha), batch, logits)


class TALR(Objective):
    """Token-adaptive loss reweighting (Lin et al. 2025, arXiv:2509.20758): exp(-nll_t / τ), at least `floor`.

    The paper takes τ anew from every batch; here it is taken once, over the rows of the stage before its first step, so
    that cutting a batch changes nothing. No code was published: the paper's normalisation is unverified.

    Args:
        tau: τ in nats; `null` = the median over the stage's rows of their mean nll when it begins.
        floor: Smallest weight.
    """

    shardable = True

    def __init__(self, *, tau: float | None = None, floor: float = 0.01) -> None:
        if (tau is not None and tau <= 0) or not 0 <= floor <= 1:
            raise refuse(
                self,
                f"tau={tau}, floor={floor}",
                why="weights are exp(-nll / tau), at least floor and at most 1",
                fix="give tau: null and floor: 0.01",
            )
        self.tau = tau
        self.floor = floor
        self._tau = tau or 1.0

    def begin_stage(self, learner: Learner, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """Take τ, where it is not given."""
        if self.tau is None:
            means: list[float] = []
            for batch, nll in token_values(learner, self, own_rows(dataset, stage.domain), when="now"):
                counts = batch.target_example.bincount(minlength=batch.size)
                sums = torch.zeros(batch.size, dtype=nll.dtype).index_add(0, batch.target_example.cpu(), nll.cpu())
                means += (sums / counts.cpu()).tolist()
            self._tau = float(torch.quantile(torch.tensor(means, dtype=torch.float64), 0.5))
        return dataset

    def losses(self, forward: Forward, batch: Batch, reference: Forward | None) -> ExampleLosses:
        """Σ max(exp(-nll_t / τ), floor) nll_t."""
        nll, logits = target_nll(forward, batch)
        return weighted(nll, talr_weights(nll, tau=self._tau, floor=self.floor), batch, logits)
