"""Early stopping on the current domain: keep the best validated state of a stage; earlier domains are not looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from residency.core.errors import UserError
from residency.core.tensors import snapshot
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.validation import validation_nll

__all__ = ["EarlyStopping", "Progress", "judged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What has been seen of a stage.

    Args:
        best: Lowest validation NLL that counted as an improvement.
        best_step: Step after which it was found; 0 = none yet.
        step: Step after which the last look was taken.
        waited: Looks since the best one.
        last: NLL of the last look.
    """

    best: float = math.inf
    best_step: int = 0
    step: int = 0
    waited: int = 0
    last: float = math.inf

    def tensor(self) -> Tensor:
        """As declared state, (5,) float64."""
        return torch.tensor([self.best, self.best_step, self.step, self.waited, self.last], dtype=torch.float64)

    @staticmethod
    def of(tensor: Tensor) -> Progress:
        """The inverse of `tensor`."""
        best, best_step, step, waited, last = tensor.tolist()
        return Progress(best=best, best_step=int(best_step), step=int(step), waited=int(waited), last=last)


def judged(progress: Progress, *, step: int, nll: float, min_delta: float) -> Progress:
    """After one more look: the best one if it is lower by more than `min_delta`; of equal ones the earlier stays."""
    if nll < progress.best - min_delta:
        return Progress(best=nll, best_step=step, step=step, last=nll)
    return replace(progress, step=step, waited=progress.waited + 1, last=nll)


class EarlyStopping(Mitigation):
    """Go back to the state of a stage that did best on the validation rows of the domain it learns.

    Looks at the model every few steps and after the last one. The stage ends in the best state seen; it ends before its
    last step only if `patience` is given (then `steps` in the record is what was run, and a learning-rate schedule is
    cut off). Validation rows of other domains are never read, so nothing is chosen by what it would forget.

    Args:
        every: Optimizer steps between two looks. 0 = off.
        patience: End the stage after so many looks without improvement; null = run all steps, then go back.
        min_delta: An improvement is larger than this, in nats per completion token.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"last step"})
    first_domain: int = 0
    follows = frozenset({"completion"})

    def __init__(self, *, every: int = 10, patience: int | None = None, min_delta: float = 0.0) -> None:
        super().__init__()
        if every < 0 or (patience is not None and patience < 1) or not min_delta >= 0:
            raise UserError(
                f"EarlyStopping with every={every}, patience={patience}, min_delta={min_delta}",
                why="every is at least 0 (off), patience at least 1 look or null, min_delta not negative",
                fix="give every: 10, patience: null, min_delta: 0.0",
            )
        self.every = every
        self.patience = patience
        self.min_delta = min_delta
        self.uses_validation = every > 0
        self.add_state("best", {})
        self.add_state("progress", Progress().tensor())

    @property
    def progress(self) -> Progress:
        """What has been seen of the running stage."""
        tensor = self.state["progress"]
        assert isinstance(tensor, Tensor)
        return Progress.of(tensor)

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """A stage that was killed after its patience had run out has nothing left to do."""
        self._end_if_due(trainer, module)

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        """Validate, where a step that is due has just been completed."""
        progress, step = self.progress, trainer.global_step
        due = self.every and step > progress.step and (step % self.every == 0 or step == module.stage.steps)
        if not due:
            return
        progress = judged(progress, step=step, nll=validation_nll(module), min_delta=self.min_delta)
        if progress.best_step == step:
            self.state["best"] = snapshot(module.adapter.trainable(module.model))
        self.state["progress"] = progress.tensor()
        self._end_if_due(trainer, module)

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        """Go back to the best state, and forget it."""
        best = self.state["best"]
        assert isinstance(best, dict)
        leaves = module.adapter.trainable(module.model) if best else {}
        for name, leaf in leaves.items():
            leaf.copy_(best[name])
        self.state.update(best={}, progress=Progress().tensor())

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """`validation_nll` of the last look, `best_nll` and `best_step`; nothing before the first look."""
        progress = self.progress
        if not progress.step:
            return {}
        return {
            "validation_nll": progress.last,
            "best_nll": progress.best,
            "best_step": float(progress.best_step),
        }

    def remembers(self, trainable: int, index: int) -> int:
        """The best leaves of the stage."""
        return 4 * trainable

    def touches_training(self, index: int) -> bool:
        """Not when off."""
        return self.every > 0 and super().touches_training(index)

    def _end_if_due(self, trainer: Trainer, module: StageModule) -> None:
        if self.patience is not None and self.progress.waited >= self.patience:
            trainer.should_stop = True
            module.ended_early = True
