"""Learning from pairs of answers: DPO and its kin with a reference, SimPO, CPO and ORPO without one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.types import Batch, Example, Stage
from residency.objectives.base import ExampleLosses, Forward, Learner, Objective, Reads, refuse, target_nll
from residency.objectives.dataset import branch_sums, distinct
from residency.objectives.pair_losses import PAIR_LOSSES, REFERENCE_FREE, PairLoss, PairSums, ties_half
from residency.objectives.reference import reference_sums, with_reference

__all__ = ["Preference", "check_pairs", "pair_metrics", "sums_of_pairs"]

_SMOOTHED = frozenset({"cdpo", "robust"})


class Preference(Objective):
    """The chosen answer rather than the rejected one, for rows with `prompt`, `chosen` and `rejected`.

    Dropout is off: the reference is the policy itself at the start of the stage, asked once per row.

    Args:
        loss: `sigmoid` (DPO), `cdpo`, `robust`, `hinge`, `ipo`, `sigmoid_norm`, `nca`, `bco_pair`, `apo_zero`,
            `apo_down`; without a reference `simpo`, `cpo`, `orpo` (`objectives.pair_losses`).
        beta: β > 0: how hard a step from the reference is held back. `sigmoid_norm` wants about 5, `simpo` about 2; of
            `orpo` it is λ, the weight of the odds ratio.
        smoothing: Share ε of labels that are taken to be flipped, of `cdpo` and `robust` (there below ½).
        gamma: Margin γ of `simpo`.
        sft_weight: Weight of the mean nll of the chosen answer beside the loss; `null` = 1 for `orpo` and `cpo`, of
            which it is a part, else 0.
        reference: `stage_start`, or `pretrained` (the adapter must provide `reference`); `null` = `stage_start` where
            the loss has one.

    Raises:
        UserError: A value is out of range, or a reference is given to a loss without one.
    """

    reads: ClassVar[Reads] = "pair"
    shardable = True
    forward_noise: ClassVar[bool] = False

    def __init__(
        self,
        *,
        loss: PairLoss = "sigmoid",
        beta: float = 0.1,
        smoothing: float = 0.0,
        gamma: float = 0.5,
        sft_weight: float | None = None,
        reference: Literal["stage_start", "pretrained"] | None = None,
    ) -> None:
        _check(self, loss, beta=beta, smoothing=smoothing, sft_weight=sft_weight, reference=reference)
        self.loss: PairLoss = loss
        self.beta = beta
        self.smoothing = smoothing
        self.gamma = gamma
        self.sft_weight = sft_weight if sft_weight is not None else float(loss in ("orpo", "cpo"))
        self.reference = None if loss in REFERENCE_FREE else reference or "stage_start"
        self.requires = frozenset({"reference"}) if reference == "pretrained" else frozenset()
        if reference == "pretrained":
            self.shardable = False  # rows that came in later are asked about in the batches that have them

    def units(self, example: Example) -> float:
        """One: a pair."""
        return 1.0

    def begin_stage(self, learner: Learner, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """Ask the reference about every row."""
        check_pairs(self, dataset, stage)
        if self.reference is None:
            return dataset
        return with_reference(learner, self, dataset, when="now" if self.reference == "stage_start" else "pretrained")

    def losses(self, forward: Forward, batch: Batch, reference: Forward | None) -> ExampleLosses:
        """The loss of each pair."""
        nll, logits = target_nll(forward, batch)
        pairs = sums_of_pairs(nll, batch, self._known(batch, reference))
        values = self._pair_loss(pairs)
        mean_nll = -pairs.chosen / pairs.chosen_tokens
        if self.sft_weight:
            values = values + self.sft_weight * mean_nll
        weights = torch.tensor([e.branches[0].weight for e in batch.examples], device=values.device)
        log = {"nll": mean_nll.detach().mean(), **pair_metrics(pairs, beta=self.beta)}
        return ExampleLosses(values=weights * values, logits=logits, log=log)

    def _pair_loss(self, pairs: PairSums) -> Tensor:
        function = PAIR_LOSSES[self.loss]
        if self.loss == "orpo":
            return self.beta * function(pairs)
        more: dict[str, float] = {"smoothing": self.smoothing} if self.loss in _SMOOTHED else {}
        if self.loss == "simpo":
            more = {"gamma": self.gamma}
        return function(pairs, beta=self.beta, **more)

    def _known(self, batch: Batch, reference: Forward | None) -> Tensor | None:
        if self.reference is None:
            return None
        # A row that came into a batch after the stage had begun can only be asked of the pretrained model.
        known = reference_sums(batch, reference if self.reference == "pretrained" else None)
        if known is None:
            raise UserError(
                f"row {batch.examples[0].row!r} of {batch.examples[0].domain} without a reference log-probability",
                why="something wrote or changed it after the stage had begun, and the policy has moved since",
                fix="leave out the mitigation that writes rows, or set model.objective.reference to pretrained",
            )
        return known


def sums_of_pairs(nll: Tensor, batch: Batch, reference: Tensor | None) -> PairSums:
    """What is known of the pairs of a batch, chosen first.

    Args:
        nll: (M,) nats of the targets.
        batch: P examples of two branches.
        reference: (P, 2) log-probabilities under the reference; `None` = 0.
    """
    log_p = -branch_sums(nll, batch)
    counts = branch_sums(torch.ones_like(nll), batch)
    base = torch.zeros_like(log_p) if reference is None else reference
    return PairSums(
        chosen=log_p[:, 0],
        rejected=log_p[:, 1],
        chosen_tokens=counts[:, 0],
        rejected_tokens=counts[:, 1],
        reference_chosen=base[:, 0],
        reference_rejected=base[:, 1],
    )


def pair_metrics(pairs: PairSums, *, beta: float) -> dict[str, Tensor]:
    """Means worth a line in the history; an accuracy counts ties as ½, so that it is ½ at the start."""
    with torch.no_grad():
        margin = beta * pairs.margin
        return {
            "rewards/chosen": beta * pairs.chosen_ratio.mean(),
            "rewards/rejected": beta * pairs.rejected_ratio.mean(),
            "rewards/margins": margin.mean(),
            "rewards/accuracies": ties_half(margin).mean(),
            "logps/chosen": pairs.chosen.mean(),
            "logps/rejected": pairs.rejected.mean(),
            "length/chosen": pairs.chosen_tokens.mean(),
            "length/rejected": pairs.rejected_tokens.mean(),
        }


def check_pairs(objective: Objective, dataset: Sequence[Example], stage: Stage) -> None:
    """Every row has a chosen and a rejected answer, and most of them differ.

    Raises:
        UserError: Naming a row, or how many carry no signal.
    """
    examples = distinct(dataset)
    for example in examples:
        if [branch.role for branch in example.branches] != ["chosen", "rejected"]:
            raise UserError(
                f"{type(objective).__name__} and row {example.row!r} of {example.domain}, which is no pair",
                why="it learns from a chosen and a rejected answer to one prompt",
                fix='give rows with "prompt", "chosen" and "rejected", or use SFT for this stage (protect earlier '
                "stages by EWC or self-distillation: rows of another kind cannot be replayed)",
            )
    same = sum(e.branches[0].tokens == e.branches[1].tokens for e in examples)
    if 2 * same > len(examples):
        raise UserError(
            f"{same} of {len(examples)} pairs of {stage.domain} with equal answers",
            why="a pair of equal answers says nothing",
            fix="raise the template's limits if they cut the answers where they part, or correct the rows",
        )


def _check(
    objective: Preference,
    loss: PairLoss,
    *,
    beta: float,
    smoothing: float,
    sft_weight: float | None,
    reference: str | None,
) -> None:
    if loss not in PAIR_LOSSES:
        raise refuse(
            objective, f"loss={loss!r}", why="there is no such loss", fix=f"choose from {', '.join(PAIR_LOSSES)}"
        )
    if not 0 < beta < math.inf or (sft_weight or 0) < 0:
        raise refuse(
            objective,
            f"beta={beta}, sft_weight={sft_weight}",
            why="beta is above 0, the weight of the likelihood not below it",
            fix="give beta: 0.1 and sft_weight: null",
        )
    if smoothing and loss not in _SMOOTHED:
        raise refuse(
            objective,
            f"loss={loss} and smoothing={smoothing}",
            why="this loss takes the labels as they are, and would leave the smoothing out",
            fix="set loss to cdpo or robust, or smoothing to 0",
        )
    if not 0 <= smoothing < (0.5 if loss == "robust" else 1):
        raise refuse(
            objective,
            f"smoothing={smoothing}",
            why="it is a share of flipped labels, for robust below ½",
            fix="lower it",
        )
    if reference is not None and loss in REFERENCE_FREE:
        raise refuse(
            objective,
            f"loss={loss} and reference={reference}",
            why="this loss has no reference",
            fix="set reference to null, or loss to sigmoid",
        )
