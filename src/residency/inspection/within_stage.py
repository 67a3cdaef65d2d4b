"""Scores of the domains so far while a new one is learnt: what the rows of the score matrix cannot see (E10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer

from residency.core.errors import UserError
from residency.core.types import Example, Split, Stage
from residency.engine.scoring.likelihoods import completion_nll, prompt_nll
from residency.inspection.base import Observer
from residency.metrics.anytime import learning_curve_area, stability_gap

if TYPE_CHECKING:
    from residency.domains.stream_data import StreamData
    from residency.engine.module import ContinualModule

__all__ = ["WithinStage"]


class WithinStage(Observer):
    """NLL of every domain so far, every `every` optimizer steps, on a few fixed rows.

    Records `curve` {domain: [[step, nats], ...]} from before the first step on (in stage.json), and per old domain
    `stability_gap`: how far it fell at the deepest below where the stage found it, in nats, 0 or less, also where it
    recovered (De Lange et al. 2023); of the domain that is learnt `area`: its mean utility over the steps, the area
    under the learning curve. A kill and a resume give the same curve.

    Looking costs forward passes, which are in the training time of the record; it draws nothing and changes nothing.

    Args:
        every: Optimizer steps between two looks.
        rows: Per domain, of its validation rows, or of its test rows if it has none; the first ones.
    """

    def __init__(self, *, every: int = 10, rows: int = 16) -> None:
        if min(every, rows) < 1:
            raise UserError(
                f"inspection WithinStage with every={every}, rows={rows}",
                why="both are counts",
                fix="give numbers from 1 on",
            )
        self.every = every
        self.rows = rows
        self._watch: _Watch | None = None

    def callbacks(self, stage: Stage, data: StreamData) -> list[Callback]:
        """A new watch over the domains up to this one."""
        self._watch = _Watch(stage=stage, data=data, every=self.every, rows=self.rows)
        return [self._watch]

    def during(self) -> Mapping[str, Any]:
        """The curves of the stage and what they come to."""
        if self._watch is None or not self._watch.curve:
            return {}
        curve, new = self._watch.curve, self._watch.stage.domain
        columns: dict[str, dict[str, float]] = {}
        for name, points in curve.items():
            steps, losses = zip(*points, strict=True)
            if name == new:
                columns[name] = {"area": learning_curve_area(steps, [-nats for nats in losses])}
            else:
                columns[name] = {"stability_gap": stability_gap(losses, higher_is_better=False)}
        return {"columns": columns, "curve": curve, "every": self.every, "rows": self.rows}


class _Watch(Callback):
    """Keeps one number per look and domain, also across a kill inside the stage."""

    def __init__(self, *, stage: Stage, data: StreamData, every: int, rows: int) -> None:
        self.stage = stage
        self.data = data
        self.every = every
        self.rows = rows
        self.curve: dict[str, list[list[float]]] = {}
        self._seen = -1
        self._examples: dict[str, Sequence[Example]] = {}

    @property
    def state_key(self) -> str:
        """Its own entry in the checkpoint."""
        return "residency.inspection.within_stage"

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Before the first step; a resumed stage has looked already."""
        if trainer.global_step == 0:
            self._look(module, 0)

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        """Where a step has just been completed, and after the last one."""
        step = trainer.global_step
        if step != self._seen and (step % self.every == 0 or step == self.stage.steps):
            self._look(module, step)

    def _look(self, module: ContinualModule, step: int) -> None:
        self._seen = step
        training = module.model.training
        module.model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                for name in self.data.order[: self.stage.index + 1]:
                    self.curve.setdefault(name, []).append([step, self._nats(module, name)])
        finally:
            module.model.train(training)

    def _nats(self, module: ContinualModule, name: str) -> float:
        if name not in self._examples:
            split: Split = "validation" if self.data.domains[name].rows("validation") else "test"
            found = self.data.evaluation_examples(name, split, module.backbone.tokenizer, competing=0)
            self._examples[name] = [example for example in found if example.targets][: self.rows]
        total = count = 0.0
        for context, group in module.adapter.route(
            module.model, name, self._examples[name], partial(prompt_nll, module)
        ):
            with context:
                total += float(completion_nll(module, group).sum())
                count += len(group)
        return total / count

    def state_dict(self) -> dict[str, Any]:
        """The curve so far."""
        return {"curve": {name: [list(point) for point in points] for name, points in self.curve.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self.curve = {name: [list(point) for point in points] for name, points in state_dict["curve"].items()}
        self._seen = max((int(points[-1][0]) for points in self.curve.values()), default=-1)
