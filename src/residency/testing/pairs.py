"""One adapter with one mitigation through two short stages: every invariant that a pair must keep, in one pass.

    off       at strength 0 the parameters are bit for bit those of a run without it
    acts      otherwise they are not, everything stays finite, and the first stage is untouched where it says so
    frozen    what is not declared as trainable does not move, weight decay included
    resume    saved inside of the second stage and continued in a fresh model: bit for bit the whole run
    evaluate  scoring changes neither model nor mitigation
    seed      nothing outside of a step touches the global generators, and inside of it they are seeded

A pair that cannot work is refused with a sentence, before a model is loaded. What a mitigation lets a study share
(`touches_training`, `changes_weights`) is taken at its word here, and so tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback

from residency.adapters import Adapter
from residency.adapters.base import changes
from residency.backbones import CausalLM
from residency.core.errors import UserError
from residency.core.tensors import snapshot
from residency.core.types import Stage, Tensors
from residency.domains.stream_data import StreamData
from residency.engine.checkpointing import History
from residency.engine.module import ContinualModule
from residency.engine.scoring.likelihoods import completion_nll, prompt_nll
from residency.engine.stage import finish_stage, restore_stage, train_stage
from residency.mitigations import Mitigation
from residency.mitigations.base import overrides
from residency.objectives import SFT
from residency.testing.comparisons import assert_still, clone, differing, generators, live_tensors, undrawn
from residency.testing.fit_without_trainer import Fits
from residency.testing.model_copies import CopiedCausalLM
from residency.testing.rows import AdapterRow, MitigationRow
from residency.testing.tiny_runs import domains

__all__ = ["Pairs", "Run", "refusal"]

STEPS = {"a": 2, "b": 3}
SAVED = 2  # step of the second stage after which a run is saved and continued elsewhere
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """What a run leaves behind.

    Args:
        between: As stored after the first stage.
        checkpoint: The file that was written inside of the second one; empty: what goes on after it begins the stage.
        final: As stored after it.
    """

    between: dict[str, Any]
    checkpoint: bytes
    final: dict[str, Any]


class Pairs:
    """Trains pairs; what they share (attached models, runs without a mitigation) is made once.

    Args:
        backbone: Folder of the tiny model.
        folder: For the data and for checkpoints.
        adapters: {name: row}.
        mitigations: {name: row}.
        marks: Names of the marks of a pair (adapter, mitigation): pairs of an adapter that have the same are one run at
            strength 0, since whoever runs one of them runs the others as well.
    """

    def __init__(
        self,
        backbone: Path,
        folder: Path,
        *,
        adapters: Mapping[str, AdapterRow],
        mitigations: Mapping[str, MitigationRow],
        marks: Callable[[str, str], Sequence[str]] = lambda adapter, mitigation: (),
    ) -> None:
        self.backbone = backbone
        self.folder = folder
        self.adapters = adapters
        self.rows = mitigations
        self.marks = marks
        self.data = StreamData(domains=domains(folder, {"a": "generative", "b": "label"}), batch_size=4)
        shape: dict[str, Any] = {"stages": len(STEPS), "seed": 0, "batch_size": 4}
        self.stages = [Stage(index=i, domain=d, steps=n, **shape) for i, (d, n) in enumerate(STEPS.items())]
        self._attached: dict[str, ContinualModule] = {}
        self._plain: dict[str, Run] = {}
        self._all_off: dict[tuple[str, ...], str] = {}

    # -- modules ------------------------------------------------------------------------------------------------

    def module(self, adapter: str, mitigations: Mapping[str, Mitigation], *, fresh: bool = False) -> ContinualModule:
        """A built module; the model is a copy of one that was attached once.

        Raises:
            UserError: The pair is refused.
        """
        row = self.adapters[adapter]
        backbone = (CausalLM if fresh else CopiedCausalLM)(path=str(self.backbone), **row.loading)
        optimizer = partial(torch.optim.AdamW, lr=row.lr, weight_decay=0.1)
        parts: dict[str, Any] = {"objective": SFT(), "optimizer": optimizer, "mitigations": dict(mitigations)}
        module = ContinualModule(backbone=backbone, adapter=row.make(), **parts)
        if isinstance(backbone, CopiedCausalLM):
            if adapter not in self._attached:
                self._attached[adapter] = self.module(adapter, {}, fresh=True)
            source = self._attached[adapter]  # to attach it again does nothing
            backbone.copies(source.model, of=source.backbone)
            with patch("residency.engine.module.choose_layout", lambda *_: (source.layout, source.layout_reason)):
                module.build(seed=0)
        else:
            module.build(seed=0)
        return module

    # -- runs ---------------------------------------------------------------------------------------------------

    def train(self, adapter: str, module: ContinualModule, *, after: Run | None = None) -> Run:
        """Both stages; or the rest of the second, after what another run has stored."""
        first, second = self.stages
        work = self.folder / "work"
        checkpoint = work / "checkpoint.safetensors"
        checkpoint.unlink(missing_ok=True)
        if after is None:
            live = self._fit(adapter, module, first, work)
            between, live = self._finish(module, live)
            self._evaluate(module, first, live)
        else:
            between = after.between
            restore_stage(module, clone(between))
            if after.checkpoint:
                checkpoint.write_bytes(after.checkpoint)
        live = self._fit(adapter, module, second, work, every=SAVED)
        return Run(between, checkpoint.read_bytes(), self._finish(module, live)[0])

    def _fit(self, adapter: str, module: ContinualModule, stage: Stage, work: Path, *, every: int = 0) -> Tensors:
        """Train; the tensors that it left."""
        watch = _Watch()
        clip = self.adapters[adapter].trainer.get("gradient_clip_val", 1.0)
        train_stage(
            module=module,
            data=self.data,
            trainers=Fits(lambda: {"gradient_clip_val": clip}),
            stage=stage,
            folder=work,
            history=History(stage=stage, every_n_steps=1, offset=0, write=lambda line: None),
            observers=[watch],
            checkpoint_every_n_steps=every,
        )
        return live_tensors(module) if changes(module.adapter, "end_stage") else watch.live

    def _finish(self, module: ContinualModule, live: Tensors) -> tuple[dict[str, Any], Tensors]:
        """What follows training: as stored, and the tensors that it left."""
        mixes = any(overrides(m, "transform_weights") for m in module.mitigations.values())
        movable = {*module.adapter.state(module.model), *module.adapter.trainable(module.model)} if mixes else set()
        before = snapshot({name: tensor for name, tensor in live.items() if name not in movable})
        with undrawn("finish_stage"):
            tree = finish_stage(module, {}, device=CPU)
        assert_still(before, live, "frozen: what follows training moved")
        for name, tensor in tree["weights"].items():
            assert not tensor.is_floating_point() or tensor.isfinite().all(), f"acts: {name} is not finite"
        return clone(tree), live_tensors(module) if mixes else live

    def _evaluate(self, module: ContinualModule, stage: Stage, live: Tensors) -> None:
        before, states = snapshot(live), _states(module)
        examples = self.data.evaluation_examples(stage.domain, "validation", module.backbone.tokenizer)[:2]
        routing = partial(prompt_nll, module)
        with undrawn("evaluation"), torch.inference_mode():
            for context, rows in module.adapter.route(module.model, stage.domain, examples, routing):
                with context:
                    completion_nll(module, rows)
        assert_still(before, live, "evaluate: scoring moved")
        assert not (found := differing(states, _states(module))), f"evaluate: scoring changed {found[0]}"

    def plain(self, adapter: str) -> Run:
        """Without mitigations."""
        if adapter not in self._plain:
            self._plain[adapter] = self.train(adapter, self.module(adapter, {}))
        return self._plain[adapter]

    # -- what must hold -----------------------------------------------------------------------------------------

    def check(self, adapter: str, mitigation: str) -> None:
        """Everything in the list above.

        Raises:
            AssertionError: Saying which part of it does not hold.
        """
        row = self.rows[mitigation]
        if why := refusal(self.adapters[adapter].make(), row):
            self._assert_refused(adapter, mitigation, why)
            return
        made = row.make()
        torch.manual_seed(1)
        run = self.train(adapter, self.module(adapter, {mitigation: made}))
        plain = self.plain(adapter)
        if not (made.touches_training(0) or made.changes_weights(0)):
            found = differing(plain.between["weights"], run.between["weights"])
            assert not found, f"acts: it says that it leaves the first stage alone, and {found[0]} differs"
        moved = differing(plain.final["weights"], run.final["weights"])
        assert row.conditional or bool(moved) != (adapter in row.idle), (
            f"acts: {len(moved)} tensors differ from a run without it"
        )
        torch.manual_seed(2)
        again = self.train(adapter, self.module(adapter, {mitigation: row.make()}), after=run)
        found = differing(run.final, again.final)
        assert not found, f"resume: {found[0]} differs from the uninterrupted run"
        self._assert_off(adapter, mitigation)

    def _assert_refused(self, adapter: str, mitigation: str, why: str) -> None:
        make = self.adapters[adapter].make
        try:
            self.module(adapter, {mitigation: self.rows[mitigation].make()})
        except UserError as error:
            text = str(error)
        else:
            raise AssertionError(f"refused: it was not, although {why}")
        wanted = (f"model.mitigations.{mitigation}", f"model.adapter {type(make()).__name__}", why, "fix: ")
        for part in wanted:
            assert part in text, f"refused: the message does not say {part!r}: {text}"

    def _assert_off(self, adapter: str, mitigation: str) -> None:
        """Mitigations at strength 0 together are one run; each has its own only if that is not the plain one."""
        marks = self.marks(adapter, mitigation)
        together = (adapter, *marks)
        if together not in self._all_off:
            made = self.adapters[adapter].make()
            compatible = [
                name for name, row in self.rows.items() if self.marks(adapter, name) == marks and not refusal(made, row)
            ]
            try:
                self._all_off[together] = self._difference_off(adapter, compatible)
            except Exception as error:
                self._all_off[together] = repr(error)
        if self._all_off[together]:
            found = self._difference_off(adapter, [mitigation])
            assert not found, f"off: {found} differs from a run without it"

    def _difference_off(self, adapter: str, mitigations: list[str]) -> str:
        plain = self.plain(adapter)
        module = self.module(adapter, {name: self.rows[name].off() for name in mitigations})
        run = self.train(adapter, module)
        ends = ((plain.between, run.between), (plain.final, run.final))
        return next((found for one, other in ends for found in differing(one["weights"], other["weights"])), "")


class _Watch(Callback):
    """Frozen is frozen while training; and preparing a domain draws nothing."""

    def __init__(self) -> None:
        self.random = generators()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        declared = pl_module.adapter.trainable(pl_module.model)
        self.live = live_tensors(pl_module)
        grad = {name for name, tensor in self.live.items() if tensor.requires_grad}
        assert {*declared} == grad, "frozen: declared as trainable is not what requires a gradient"
        self.before = snapshot({name: tensor for name, tensor in self.live.items() if name not in declared})

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        assert self.random == generators(), "seed: preparing the domain drew from a global generator"

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert_still(self.before, self.live, "frozen: training moved")


def refusal(adapter: Adapter, row: MitigationRow) -> str:
    """What the message must say if the pair has to be refused, else nothing; read off the classes."""
    mitigation = row.make()
    if missing := sorted(mitigation.requires - adapter.provides):
        return f"needs {', '.join(missing)}"
    late = any(overrides(mitigation, hook) for hook in ("transform_gradients", "transform_update"))
    return "comes after the backward pass" if adapter.steps_in_backward and late else row.refuses(adapter)


def _states(module: ContinualModule) -> dict[str, Any]:
    states: dict[str, Any] = clone({name: m.state_dict() for name, m in module.mitigations.items()})
    return states
