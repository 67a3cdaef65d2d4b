"""The LightningModule that owns backbone, adapter, objective and mitigations. The ONLY caller of the hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial, reduce
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from residency.adapters.base import Adapter, changes
from residency.backbones.base import Backbone
from residency.backbones.layout import LayoutChoice, choose_layout
from residency.backbones.loading import check_tokenizer
from residency.core.randomness import seed_devices
from residency.core.ranks import rank, ranks
from residency.core.tensors import snapshot
from residency.core.types import NOTHING, Batch, Example, Layout, Stage, Tensors, untyped
from residency.engine import folds
from residency.engine.compatibility import check_parts
from residency.engine.fused_optimizer import fuse
from residency.engine.lost_updates import told_if_lost
from residency.engine.observation import adapter_stage, logs_step
from residency.engine.past import as_it_was, writing
from residency.engine.schedules import with_schedule
from residency.engine.serving import merge_stage
from residency.engine.stage_overrides import StageSettings
from residency.engine.training_mode import check_checkpointing, trains_in_training_mode
from residency.mitigations.base import Mitigation
from residency.objectives.base import Forward, Objective, Passes, Was

__all__ = ["ContinualModule"]


class ContinualModule(LightningModule):
    """A pretrained model that learns one domain after another.

    The loop with its hooks (M = fold over the mitigations in order; a hook that nobody overrides costs nothing):

        for stage in stream:                                  # runs.stream.train_stream, a fresh Trainer each
            M.prepare_dataset(module, dataset, stage)         # once, also across resumes; before each one's transform
            dataset = M.transform_dataset(examples, stage)
            before  = adapter.state(model)                    # only if somebody overrides transform_weights
            M.before_adapter(module, stage)                   # teachers: what the stage before left
            adapter.begin_stage(model, stage, observe)        # a new block, factors drawn anew
            dataset = objective.begin_stage(module, dataset, stage)   # what the reference says of each row
            M.on_domain_start(module, stage)                  # once, also across resumes
            for batch in dataset:                             # Trainer.fit
                batch   = M.transform_batch(module, batch)
                batch   = objective.prepare(module, batch)    # answers written by the policy itself
                outputs = objective(forward, batch, reference)
                loss    = outputs.loss + sum(adapter.loss_terms(model, stage))
                          + sum(M.loss_terms(module, batch, outputs))
                loss.backward()                               # x accumulated micro-batches, all-reduced
                grads   = M.transform_gradients(module, grads)
                clip(grads); optimizer.step()
                weights = adapter.transform_update(model, weights before the step, weights after it)
                weights = M.transform_update(module, weights before the step, weights so far)
            adapter.end_stage(model, stage, observe)          # the end of training: runs with one past share it
            weights = M.transform_weights(module, weights of `before`, weights now)    # finish_stage
            served  = M.served_weights(module, weights of `before`, weights)           # scored, never trained on
            M.on_domain_end(module, stage)                    # remember, at the final weights; not after the last
            save state; score every domain; write the record  # runs.stream

    Args:
        backbone: The pretrained model and its tokenizer.
        adapter: Which coordinates move, and how they step.
        objective: What is minimised.
        mitigations: What protects earlier domains, by name, applied in this order.
        optimizer: Optimizer of a stage; every stage starts with a fresh one.
        scheduler: Learning-rate schedule of a stage, stepped after every optimizer step.
        layout: `packed` (no padding), `padded`, or `auto`: packed where a check on this model finds it exact.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        adapter: Adapter,
        objective: Objective,
        mitigations: dict[str, Mitigation] | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.01),
        scheduler: LRSchedulerCallable | None = None,
        layout: LayoutChoice = "auto",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter
        self.objective = objective
        self.mitigations = dict(mitigations or {})
        self.optimizer_factory = optimizer
        self.scheduler_factory = scheduler
        self.layout_choice: LayoutChoice = layout
        for name, mitigation in self.mitigations.items():
            mitigation.name = name
        check_parts(backbone, adapter, self.mitigations, objective)
        self._active = folds.active_hooks(self.mitigations.values())
        self._adapts_update = changes(adapter, "transform_update")
        # Only the adapter's tensors are stored and restored; the backbone comes from its own files.
        self.strict_loading = False
        self.model: nn.Module
        self.layout: Layout
        self.layout_reason, self.stage_settings = "", StageSettings()
        self.stage: Stage
        self.dataset: Sequence[Example] = ()
        self.validation: Callable[[], Sequence[Example]] = tuple
        self.ended_early = self._started = False
        self.base_weights, self.trained_weights = NOTHING, NOTHING
        self._base_state: dict[str, Tensor] = {}
        self.weights_log, self.objective_log = dict[str, float](), dict[str, Tensor]()
        self.served: Mapping[str, Tensor] = {}  # what is scored, where that is not what training goes on from
        self._before_stage, self._start = dict[str, Tensor](), dict[str, Tensor]()
        self.weights_after: Callable[[int], Tensors]  # given by whoever keeps the states of a run

    def build(self, *, seed: int) -> None:
        """Load the backbone and attach the adapter; does nothing the second time.

        Args:
            seed: Of the adapter's initial values and of a classifier's head, which depend on nothing else.
        """
        if hasattr(self, "model"):
            return
        self.backbone = self.backbone.seeded(seed)
        check_tokenizer(self.backbone.tokenizer, model := self.backbone.load())
        with torch.random.fork_rng(devices=[]):
            seed_devices(seed, "adapter")
            self.model = self.adapter.attach(model)
        self.backbone.check_attached(self.model)
        check_checkpointing(self.stage_settings.objectives(self.objective), self.model)
        self.remember_base()
        self.layout, self.layout_reason = choose_layout(self.layout_choice, self.backbone, self.model)

    def remember_base(self) -> None:
        """Keep the state before any training, if a mitigation mixes with it."""
        if any(mitigation.uses_base for mitigation in self.mitigations.values()):
            self._base_state = snapshot(self.adapter.state(self.model))

    def begin_stage(
        self,
        stage: Stage,
        examples: Sequence[Example],
        validation: Callable[[], Sequence[Example]] = tuple,
        *,
        stored: Mapping[str, Any] = NOTHING,
    ) -> None:
        """Prepare one stage: fold the training set through the mitigations, let the adapter open its block.

        A function of the state that the stage before left: a stage that goes on after a kill is begun again.

        Args:
            stage: Which one; `examples`: its own training set by position.
            validation: Gives the validation rows of its domain, as `self.validation()` then does to mitigations.
            stored: States of mitigations that prepared this stage before, by name.
        """
        self.stage, self.validation, self.weights_log = stage, validation, {}
        self.backbone.learned, self.ended_early, self._started, self.served = stage.index + 1, False, False, {}
        self.dataset, self.objective = examples, self.stage_settings.objective(stage.domain) or self.objective
        for mitigation in self.mitigations.values():
            mitigation.move_state(torch.device("cpu"))
        folds.prepare_dataset(self, self.mitigations.values(), stage, stored=stored)
        merges = self._active["transform_weights"] or self._active["served_weights"]
        self._before_stage = snapshot(self.adapter.state(self.model)) if merges else {}
        folds.before_adapter(self, self.mitigations.values(), stage, stored=stored)
        adapter_stage(self, self.adapter.begin_stage, "begin")
        folds.load_states(self.mitigations, stored)  # what they made of the rows is what the objective begins with
        self._start = snapshot(self.adapter.trainable(self.model)) if self.objective.keeps_start else {}
        self.dataset = self.objective.begin_stage(self, self.dataset, stage)

    def frozen_inputs(self) -> dict[str, list[Tensor]]:
        """Input directions that mitigations keep out of the updates of a matrix, by the path of its owner."""
        return folds.frozen_inputs(self, self.mitigations.values())

    def forward(self, batch: Batch) -> Tensor:
        """(M, V) logits at the supervised positions."""
        return self.backbone.logits(self.model, batch)

    @property
    def trained_forward(self) -> Forward:
        """What the objective gets in a training step: with a way around the logits where no mitigation reads them."""
        readers = (m for m in self.mitigations.values() if m.uses_logits)
        if any(reader.touches_training(self.stage.index) for reader in readers):
            return self.forward
        return Passes(logits=self.forward, nll=partial(self.backbone.nll, self.model))

    def reference_forward(self, batch: Batch) -> Tensor:
        """(M, V) logits of the pretrained model, without gradient (the adapter provides `reference`)."""
        with self.as_it_was("pretrained"):
            return self.forward(batch)

    def as_it_was(self, when: Was | Tensors) -> AbstractContextManager[None]:
        """Inside, the model is in evaluation mode, without gradients, with the weights of then, or with those given."""
        return as_it_was(self.model, self.adapter, when, start=self._start)

    def writing(self) -> AbstractContextManager[None]:
        """Inside, the model writes: as it is now, in evaluation mode, without gradients, in its fastest form."""
        return writing(self.model, self.adapter)

    def example_losses(self, batch: Batch) -> Tensor:
        """(B,) what the objective makes of each example of a batch, summed over its units."""
        reference = self.reference_forward if "reference" in self.adapter.provides else None
        return self.objective.per_example(self.forward, batch, reference)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One micro-batch: transform, objective, added terms."""
        batch = self._fold("transform_batch", batch, lambda m, b: m.transform_batch(self, b))
        batch = self.objective.prepare(self, batch)
        reference = self.reference_forward if "reference" in self.adapter.provides else None
        outputs = self.objective(self.trained_forward, batch, reference)
        terms = {"task": outputs.loss, **folds.added_terms(self, self._active["loss_terms"], batch, outputs)}
        loss = reduce(torch.add, terms.values())
        logged: dict[str, Any] = {f"loss/{name}": value.detach() for name, value in terms.items()}
        if logs_step(self.global_step + 1, every=untyped(self.trainer).log_every_n_steps, last=self.stage.steps):
            logged |= folds.metrics_to_log(self, self.mitigations.values())
        self.objective_log = dict(outputs.log)
        self.log_dict(logged | {"loss": loss.detach()} | self.objective_log, batch_size=batch.size)
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Global draws of this micro-batch, dropout too, start from the seed of its place, whatever its rank."""
        micro = batch_idx * ranks() + rank()
        seed_devices(self.stage.seed, "step", self.stage.index, micro, 0)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Fold the gradients: accumulated, reduced over ranks, unscaled, not yet clipped."""
        if self._active["transform_gradients"]:
            folds.write_gradients(self, self._active["transform_gradients"])

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then fold the update."""
        replaces = bool(self._active["transform_update"]) or self._adapts_update
        first = self.global_step == 0
        leaves = self.adapter.trainable(self.model) if replaces or first else {}
        before = snapshot(leaves) if replaces else {}
        with told_if_lost(leaves if first else {}), self.backbone.stepping(self.model):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if replaces:
            folds.write_update(self, self._active["transform_update"], before, adapts=self._adapts_update)

    def configure_optimizers(self) -> Any:
        """A fresh optimizer, by way of the adapter."""
        own = self.stage_settings.factories(self.stage.domain, self.optimizer_factory, self.scheduler_factory)
        optimizer = fuse(self.adapter.optimizer(self.model, own[0]))
        return optimizer if own[1] is None else with_schedule(optimizer, own[1], steps=self.stage.steps)

    def configure_callbacks(self) -> list[Callback]:
        """The mitigations take part in Lightning's own hooks and checkpoints."""
        return list(self.mitigations.values())

    def on_train_start(self) -> None:
        """Start the domain, unless a resumed checkpoint says that it has started; Lightning left evaluation mode on."""
        for mitigation in self.mitigations.values():
            mitigation.move_state(self.device)
        self.model.train(trains_in_training_mode(self.objective, self.model))
        if not self._started:
            for mitigation in self._active["on_domain_start"]:
                mitigation.on_domain_start(self, self.stage)
            self._started = True

    def on_train_end(self) -> None:
        """The end of training itself: what the adapter merges or remembers."""
        self.model.eval()
        adapter_stage(self, self.adapter.end_stage, "end")

    def finish_stage(self, *, remember: bool = True) -> None:
        """What follows training: mix weights, then let mitigations remember, at the final weights.

        `remember`: whether another stage follows. Not part of the fit, so that it can be done again, with other
        mitigations, from a stored trained state (after `begin_stage` and `Adapter.load_state`).
        """
        self.model.eval()
        for mitigation in self.mitigations.values():
            mitigation.move_state(self.device)
        self.weights_log, self.served = merge_stage(self, self._active, self._before_stage, self._base_state)
        with torch.enable_grad():
            for mitigation in self._active["on_domain_end"] if remember else ():
                mitigation.on_domain_end(self, self.stage)
        for mitigation in self.mitigations.values():
            mitigation.move_state(torch.device("cpu"))
        self._before_stage = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the adapter's state instead of the whole model."""
        parts = {"adapter": self.adapter.state(self.model), "objective": self.objective.state_dict()}
        checkpoint |= {"state_dict": {}, "residency": {"started": self._started, **parts}}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore what the hooks need; the adapter restores its own tensors, which may be more than were attached."""
        self._started = checkpoint["residency"]["started"]
        self.adapter.load_state(self.model, checkpoint["residency"]["adapter"])
        self.objective.load_state_dict(checkpoint["residency"].get("objective", {}))  # older files have none

    def _fold(self, hook: str, value: Any, call: Callable[[Any, Any], Any]) -> Any:
        for mitigation in self._active[hook]:
            value = call(mitigation, value)
        return value
