"""One adapter with one mitigation through two short stages: every invariant that a pair must keep, in one pass.

    off       at strength 0 the parameters are bit for bit those of a run without it
    acts      otherwise they are not, everything stays finite, and the first stage is untouched where it says so
    frozen    what is not declared as trainable does not move, weight decay included
    resume    saved inside of the second stage and continued in a fresh model: bit for bit the whole run
    evaluate  scoring changes neither model nor mitigation
    seed      nothing outside of a step touches the global generators, and inside of it they are seeded

A pair that cannot work is refused with a sentence, before a model is loaded. What a mitigation shares with a study's other
cells (`touches_training`, `changes_weights`) is taken at its word here, and so tested.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback

from fitting import Fit, stored
from residency.adapters import Adapter
from residency.backbones import CausalLM
from residency.data import StreamData
from residency.errors import UserError
from residency.evaluation import completion_nll, prompt_nll
from residency.mitigations import Mitigation
from residency.mitigations.base import overrides
from residency.module import ContinualModule
from residency.objectives import SFT
from residency.stages import finish_stage, restore_stage
from residency.types import Stage
from running import domains
from table import ADAPTERS, MITIGATIONS, MitigationRow

__all__ = ["Pairs", "Run", "differing"]

STEPS = {"a": 2, "b": 3}
SAVED = 2  # step of the second stage after which a run is saved and continued elsewhere
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """What a run leaves behind.

    Args:
        between: As stored after the first stage.
        checkpoint: As stored in the second one.
        final: As stored after it.
    """

    between: dict[str, Any]
    checkpoint: dict[str, Any]
    final: dict[str, Any]


class Pairs:
    """Trains pairs; what they share (attached models, runs without a mitigation) is made once.

    Args:
        backbone: Folder of the tiny model.
        folder: For the data.
        rows: The mitigations.
    """

    def __init__(self, backbone: Path, folder: Path, rows: Mapping[str, MitigationRow] = MITIGATIONS) -> None:
        self.backbone = backbone
        self.rows = rows
        self.data = StreamData(domains=domains(folder, {"a": "generative", "b": "label"}), batch_size=4)
        shape = {"stages": len(STEPS), "seed": 0, "batch_size": 4}
        self.stages = [Stage(index=i, domain=d, steps=n, **shape) for i, (d, n) in enumerate(STEPS.items())]
        self._attached: dict[str, ContinualModule] = {}
        self._plain: dict[str, Run] = {}
        self._all_off: dict[str, str] = {}

    # -- modules ------------------------------------------------------------------------------------------------

    def module(self, adapter: str, mitigations: Mapping[str, Mitigation], *, fresh: bool = False) -> ContinualModule:
        """A built module; the model is a copy of one that was attached once.

        Raises:
            UserError: The pair is refused.
        """
        row = ADAPTERS[adapter]
        optimizer = partial(torch.optim.AdamW, lr=row.lr, weight_decay=0.1)
        backbone = CausalLM(path=str(self.backbone), **row.loading)
        parts: dict[str, Any] = {"objective": SFT(), "optimizer": optimizer, "mitigations": dict(mitigations)}
        module = ContinualModule(backbone=backbone, adapter=row.make(), **parts)
        if fresh:
            module.build(seed=0)
            return module
        if adapter not in self._attached:
            self._attached[adapter] = self.module(adapter, {}, fresh=True)
        source = self._attached[adapter]
        module.backbone, module.layout = source.backbone, source.layout
        module.adapter, module.model = copy.deepcopy((source.adapter, source.model))
        return module

    # -- runs ---------------------------------------------------------------------------------------------------

    def train(self, adapter: str, module: ContinualModule, *, after: Run | None = None) -> Run:
        """Both stages; or the rest of the second, after what another run has stored."""
        clip = ADAPTERS[adapter].trainer.get("gradient_clip_val", 1.0)
        first, second = self.stages
        if after is None:
            self._fit(module, first, Fit, clip=clip)
            between = self._finish(module)
            self._evaluate(module, first)
        else:
            between = after.between
            restore_stage(module, between)
        fit = self._fit(module, second, Fit, clip=clip, save_at=SAVED, checkpoint=after and after.checkpoint)
        return Run(between, fit.checkpoint, self._finish(module))

    def _fit(self, module: ContinualModule, stage: Stage, fit: Any, *, checkpoint: Any = None, **options: Any) -> Fit:
        with _undrawn("begin_stage"):
            module.begin_stage(stage, self.data.examples(stage, module.backbone.tokenizer))
        fit = Fit(module, **options)
        fit.callbacks.append(_Watch())
        fit.run(checkpoint)
        return fit

    def _finish(self, module: ContinualModule) -> dict[str, Any]:
        """What follows training; as stored."""
        mixes = any(overrides(m, "transform_weights") for m in module.mitigations.values())
        movable = {*module.adapter.state(module.model)} | {*module.adapter.trainable(module.model)} if mixes else set()
        still = _tensors(module, without=movable)
        with _undrawn("finish_stage"):
            tree = finish_stage(module, {}, device=CPU)
        _assert_still(still, module, "frozen: what follows training moved")
        for name, tensor in tree["weights"].items():
            assert not tensor.is_floating_point() or tensor.isfinite().all(), f"acts: {name} is not finite"
        return stored(tree)

    def _evaluate(self, module: ContinualModule, stage: Stage) -> None:
        before, states = _tensors(module), _states(module)
        data, tokenizer = self.data, module.backbone.tokenizer
        examples = data.evaluation_examples(stage.domain, "validation", tokenizer)[:2]
        with _undrawn("evaluation"), torch.inference_mode():
            for context, rows in module.adapter.serve(module.model, stage.domain, examples, partial(prompt_nll, module)):
                with context:
                    completion_nll(module, rows)
        _assert_still(before, module, "evaluate: scoring moved")
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
        if why := _refusal(ADAPTERS[adapter].make(), row):
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
        assert bool(moved) != (adapter in row.idle), f"acts: {len(moved)} tensors differ from a run without it"
        torch.manual_seed(2)
        again = self.train(adapter, self.module(adapter, {mitigation: row.make()}), after=run)
        found = differing(run.final, again.final)
        assert not found, f"resume: {found[0]} differs from the uninterrupted run"
        self._assert_off(adapter, mitigation)

    def _assert_refused(self, adapter: str, mitigation: str, why: str) -> None:
        make = ADAPTERS[adapter].make
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
        """All mitigations at strength 0 together are one run; each has its own only if that is not the plain one."""
        if adapter not in self._all_off:
            compatible = [name for name, row in self.rows.items() if not _refusal(ADAPTERS[adapter].make(), row)]
            try:
                self._all_off[adapter] = self._difference_off(adapter, compatible)
            except Exception as error:
                self._all_off[adapter] = repr(error)
        if self._all_off[adapter]:
            found = self._difference_off(adapter, [mitigation])
            assert not found, f"off: {found} differs from a run without it"

    def _difference_off(self, adapter: str, mitigations: list[str]) -> str:
        plain = self.plain(adapter)
        module = self.module(adapter, {name: self.rows[name].off() for name in mitigations})
        run = self.train(adapter, module)
        pairs = ((plain.between, run.between), (plain.checkpoint, run.checkpoint), (plain.final, run.final))
        without = [({**a, "mitigations": 0, "facts": 0, "callbacks": 0}, {**b, "mitigations": 0, "facts": 0, "callbacks": 0}) for a, b in pairs]
        return next((name for one, other in without for name in differing(one, other)), "")


class _Watch(Callback):
    """Frozen is frozen while training; and preparing a domain draws nothing."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        declared = pl_module.adapter.trainable(pl_module.model)
        grad = {name for name, p in pl_module.model.named_parameters() if p.requires_grad}
        assert {*declared} == grad, "frozen: declared as trainable is not what requires a gradient"
        self.still = _tensors(pl_module, without={*declared})
        self.random: Any = _generators()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.random is not None:
            assert self.random == _generators(), "seed: preparing the domain drew from a global generator"
        self.random = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        _assert_still(self.still, pl_module, "frozen: training moved")


def _refusal(adapter: Adapter, row: MitigationRow) -> str:
    """What the message must say if the pair has to be refused, else nothing; read off the classes."""
    mitigation = row.make()
    if missing := sorted(mitigation.requires - adapter.provides):
        return f"needs {', '.join(missing)}"
    late = any(overrides(mitigation, hook) for hook in ("transform_gradients", "transform_update"))
    return "comes after the backward pass" if adapter.steps_in_backward and late else row.refuses(adapter)


def differing(one: Any, other: Any, name: str = "") -> list[str]:
    """Where two trees are not equal bit for bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [name]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if {*one} != {*other}:
            return [f"{name}: {sorted({*map(str, one)} ^ {*map(str, other)})}"]
        return [found for key in one for found in differing(one[key], other[key], f"{name}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [found for i, (a, b) in enumerate(zip(one, other, strict=True)) for found in differing(a, b, f"{name}/{i}")]
    return [] if one == other else [name]


def _states(module: ContinualModule) -> dict[str, Any]:
    return stored({name: m.state_dict() for name, m in module.mitigations.items()})


def _tensors(module: ContinualModule, *, without: set[str] = frozenset()) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:  # type: ignore[assignment]
    """Parameters and buffers by name: live, and a copy."""
    live = dict(module.model.named_parameters()) | dict(module.model.named_buffers())
    return {name: (t, t.detach().clone()) for name, t in live.items() if name not in without}


def _assert_still(tensors: dict[str, tuple[torch.Tensor, torch.Tensor]], module: ContinualModule, message: str) -> None:
    for name, (live, before) in tensors.items():
        assert torch.equal(live.detach(), before), f"{message} {name}"


def _generators() -> Any:
    numbers = np.random.get_state(legacy=False)["state"]
    return (torch.get_rng_state().numpy().tobytes(), random.getstate(), numbers["key"].tobytes(), numbers["pos"])


@contextmanager
def _undrawn(what: str) -> Iterator[None]:
    before = _generators()
    yield
    assert before == _generators(), f"seed: {what} drew from a global generator"
