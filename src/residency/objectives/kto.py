"""Learning from answers of which each is wanted or not, without pairs: Kahneman-Tversky optimisation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.types import Batch, Example, Stage
from residency.objectives.base import ExampleLosses, Forward, Learner, Objective, Reads, Was, refuse, target_nll
from residency.objectives.dataset import branch_sums, distinct, own_rows, token_values
from residency.objectives.pair_losses import implied_reward, kto, kto_baseline
from residency.objectives.reference import reference_sums, with_reference

__all__ = ["KTO"]


class KTO(Objective):
    """KTO (Ethayarajh et al. 2024) on rows with `prompt`, `completion` and whether the completion is wanted.

    Its baseline z, how much likelier answers became on average whatever they are, is taken over the whole global batch,
    from each prompt with the answer of the row before it, by one more pass before the step. So a step does not depend
    on how it is cut; with one micro-batch it is TRL's.

    Args:
        beta: β > 0.
        wanted: λ of wanted answers.
        unwanted: λ of unwanted ones. Keep λ n of the two within 1 to 4/3 of each other.
        baseline: `batch`, or `none`: z = 0 (the unpaired APO-zero).
        reference: `stage_start` (a copy of what trains is kept for the baseline), or `pretrained` (the adapter must
            provide `reference`).
    """

    reads: ClassVar[Reads] = "unpaired"
    shardable = True
    forward_noise: ClassVar[bool] = False

    def __init__(
        self,
        *,
        beta: float = 0.1,
        wanted: float = 1.0,
        unwanted: float = 1.0,
        baseline: Literal["batch", "none"] = "batch",
        reference: Literal["stage_start", "pretrained"] = "stage_start",
    ) -> None:
        if not beta > 0 or wanted < 0 or unwanted < 0:
            raise refuse(
                self,
                f"beta={beta}, wanted={wanted}, unwanted={unwanted}",
                why="beta is above 0, weights are not negative",
                fix="give beta: 0.1, wanted: 1.0, unwanted: 1.0",
            )
        self.beta = beta
        self.weights = wanted, unwanted
        self.baseline = baseline
        self.reference = reference
        self.requires = frozenset({"reference"}) if reference == "pretrained" else frozenset()
        if reference == "pretrained":
            self.shardable = False  # rows that came in later are asked about in the batches that have them
        self.keeps_start = baseline == "batch" and reference == "stage_start"
        self._z = torch.zeros(())
        self._step: tuple[int, int] | None = None

    def units(self, example: Example) -> float:
        """One: an answer."""
        return 1.0

    def begin_stage(self, learner: Learner, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """Check the rows and ask the reference about each."""
        self._check(dataset, stage)
        self._step, self._z = None, torch.zeros(())
        when: Was = "now" if self.reference == "stage_start" else "pretrained"
        return with_reference(learner, self, dataset, when=when)

    def prepare(self, learner: Learner, batch: Batch) -> Batch:
        """Take z once per step, over its global batch."""
        step = learner.stage.index, learner.global_step
        if self.baseline == "batch" and self._step != step:
            examples = batch.whole.examples
            others = [e.branches[0].tokens for e in (examples[-1], *examples[:-1])]
            mixed = [
                # Named by slot: the same row may come twice, and is then another question.
                replace(e, row=str(i), branches=(replace(e.branches[0], tokens=tokens, mask=(), reference=None),))
                for i, (e, tokens) in enumerate(zip(examples, others, strict=True))
            ]
            now = self._log_likelihoods(learner, mixed, "now")
            then = self._log_likelihoods(learner, mixed, self.reference)
            self._z, self._step = kto_baseline(now - then).float(), step
        return batch

    def losses(self, forward: Forward, batch: Batch, reference: Forward | None) -> ExampleLosses:
        """The loss of each answer, z as `prepare` took it last."""
        nll, logits = target_nll(forward, batch)
        log_p = -branch_sums(nll, batch)[:, 0]
        known = reference_sums(batch, reference if self.reference == "pretrained" else None)
        if known is None:
            raise UserError(
                f"row {batch.examples[0].row!r} of {batch.examples[0].domain} without a reference log-probability",
                why="something wrote or changed it after the stage had begun, and the policy has moved since",
                fix="leave out the mitigation that writes rows, or set model.objective.reference to pretrained",
            )
        ratio = log_p - known[:, 0]
        good = torch.tensor([e.branches[0].role == "chosen" for e in batch.examples], device=ratio.device)
        weights = torch.tensor([e.branches[0].weight for e in batch.examples], device=ratio.device)
        values = kto(ratio, good, self._z.to(ratio.device), beta=self.beta, weights=self.weights)
        reward = implied_reward(ratio, beta=self.beta)
        log = {"kl": self._z}
        for name, side in (("chosen", good), ("rejected", ~good)):
            if bool(side.any()):
                log[f"rewards/{name}"] = reward[side].mean()
        return ExampleLosses(values=weights * values, logits=logits, log=log)

    def state_dict(self) -> dict[str, Tensor]:
        """z of the last step."""
        return {"baseline": self._z.detach().cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Bring it back."""
        self._z = state["baseline"]

    def _log_likelihoods(self, learner: Learner, examples: Sequence[Example], when: Was) -> Tensor:
        found: dict[str, float] = {}
        for batch, nll in token_values(learner, self, examples, when=when):
            sums = (-branch_sums(nll, batch)[:, 0]).tolist()
            found |= zip((e.row for e in batch.examples), sums, strict=True)
        return torch.tensor([found[e.row] for e in examples], dtype=torch.float64)

    def _check(self, dataset: Sequence[Example], stage: Stage) -> None:
        examples = distinct(dataset)
        for example in examples:
            if [branch.role in ("chosen", "rejected") for branch in example.branches] != [True]:
                raise UserError(
                    f"KTO and row {example.row!r} of {example.domain}, which is not one answer that is wanted or not",
                    why="it learns from single answers of which each is marked",
                    fix='give rows with "prompt", "completion" and a boolean "label", or use Preference for pairs',
                )
        if self.baseline == "batch" and stage.batch_size < 2:
            raise UserError(
                f"KTO on {stage.domain} with data.batch_size=1",
                why="its baseline pairs each prompt with the answer of another row of the step",
                fix="raise data.batch_size, or set model.objective.baseline to none",
            )
        own = [e.branches[0].role == "chosen" for e in own_rows(dataset, stage.domain)]
        balance = self.weights[0] * sum(own), self.weights[1] * (len(own) - sum(own))
        if min(balance) > 0 and not 1 <= balance[0] / balance[1] <= 4 / 3:
            warnings.warn(
                f"KTO on {stage.domain}: weight times rows is {balance[0]:g} for wanted answers and {balance[1]:g} for "
                "unwanted ones; the paper keeps their ratio between 1 and 4/3 (model.objective.wanted, unwanted)",
                stacklevel=2,
            )
