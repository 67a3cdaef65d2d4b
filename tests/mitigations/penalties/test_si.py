"""Synaptic intelligence: the path explains the drop of the loss, and is read where nothing has touched it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from residency.adapters.peft import lora
from residency.core.errors import UserError
from residency.core.signals import Stopped
from residency.core.tensors import snapshot
from residency.core.types import Stage, Tensors
from residency.mitigations import SI, Mitigation
from residency.mitigations.penalties.si import path_contribution, path_importance
from residency.testing.tiny_runs import train

CURVATURE = torch.tensor([1.0, 4.0, 0.5])
STAGE = Stage(index=0, domain="d", stages=2, seed=0, steps=1, batch_size=1)


class Toy:
    """A module as SI sees it: a quadratic in `w`, and `still`, which has no gradient."""

    def __init__(self) -> None:
        self.w = torch.tensor([3.0, -2.0, 1.0], requires_grad=True)
        self.still = torch.ones(2, requires_grad=True)
        self.model = None
        self.adapter = SimpleNamespace(trainable=lambda model: {"w": self.w, "still": self.still})

    def loss(self, target: float) -> Tensor:
        return 0.5 * (CURVATURE * (self.w - target) ** 2).sum()

    def learn(self, si: SI, target: float, *, lr: float = 1e-3, steps: int = 500) -> float:
        """Small steps of SGD on the task alone; the drop of the loss."""
        before = float(self.loss(target).detach())
        module: Any = self
        si.on_domain_start(module, STAGE)
        for _ in range(steps):
            self.w.grad = torch.autograd.grad(self.loss(target), self.w)[0]
            si.on_before_optimizer_step(None, module, None)
            old = snapshot(self.adapter.trainable(None))
            with torch.no_grad():
                self.w -= lr * self.w.grad
            after = {"w": self.w.detach(), "still": self.still.detach()}
            assert si.transform_update(module, old, after) is after
        return before - float(self.loss(target).detach())


def named(si: SI, key: str) -> dict[str, Tensor]:
    value = si.state[key]
    assert isinstance(value, dict)
    return value


def test_the_path_is_the_drop_of_the_loss() -> None:
    """C4, within 5 %; what did not move has no part in it."""
    si, toy = SI(), Toy()
    drop = toy.learn(si, 0.0)
    assert float(named(si, "path")["w"].sum()) == pytest.approx(drop, rel=0.05)
    module: Any = toy
    assert si.metrics_to_log(module)["path"] == pytest.approx(drop, rel=0.05)
    assert not named(si, "path")["still"].any()


def test_importances_never_fall() -> None:
    si, toy = SI(), Toy()
    module: Any = toy
    toy.learn(si, 0.0)
    si.on_domain_end(module, STAGE)
    first = named(si, "precision")
    assert bool((first["w"] > 0).all())
    assert not first["still"].any()
    toy.learn(si, 5.0)
    si.on_domain_end(module, STAGE)
    second = named(si, "precision")
    assert bool((second["w"] > first["w"]).all())
    assert torch.equal(named(si, "anchor")["w"], toy.w.detach())
    assert named(si, "path") == named(si, "start") == {}


def test_formulas_of_a_step_and_of_a_domain() -> None:
    gradients = {"a": torch.tensor([2.0, -1.0])}
    before, after = {"a": torch.tensor([1.0, 1.0])}, {"a": torch.tensor([0.5, 0.0])}
    path = path_contribution(gradients, before, after)
    assert path["a"].tolist() == [1.0, -1.0]
    found = path_importance(path, before, after, xi=0.25)["a"]
    assert found.tolist() == [1.0 / (0.25 + 0.25), 0.0], "a path that raised the loss is of no importance"


def test_penalty_has_no_half() -> None:
    """c Σ Ω (θ - θ*)², with gradient 2 c Ω (θ - θ*)."""
    si, toy = SI(strength=3.0), Toy()
    si.state.update(precision={"w": torch.ones(3), "still": torch.zeros(2)})
    si.state.update(anchor={"w": toy.w.detach() - 1, "still": toy.still.detach()})
    module: Any = toy
    assert float(si.loss_terms(module, None, None)["penalty"]) == 9
    pulled = si.transform_gradients(module, {"w": torch.zeros(3)})
    assert pulled["w"].tolist() == [6.0, 6.0, 6.0]


class Push(Mitigation):
    """Adds a large number to every gradient."""

    def transform_gradients(self, module: Any, gradients: Tensors) -> Tensors:
        """As said."""
        return {name: g + 1e3 for name, g in gradients.items()}


class Spy(SI):
    """Keeps the norms of the gradients it used."""

    norms: list[float]

    def transform_update(self, module: Any, before: Tensors, after: Tensors) -> Tensors:
        """As said."""
        self.norms = [
            *getattr(self, "norms", []),
            float(torch.cat([g.flatten() for g in self._gradients.values()]).norm()),
        ]
        return super().transform_update(module, before, after)


def test_the_gradient_is_the_tasks_unclipped_and_whole(llama: Path, tmp_path: Path) -> None:
    """Before other mitigations and clipping, once per step, the mean over micro-batches."""
    norms = []
    for micro in (4, 1):
        spy = Spy()
        options = {"kinds": {"a": "label"}, "trainer": {"gradient_clip_val": 1e-4}, "steps": 3, "lr": 1e-4}
        parts = {"push": Push(), "si": spy}
        train(tmp_path / str(micro), llama, lora(r=2), parts, data={"micro_batch_size": micro}, **options)
        assert len(spy.norms) == 3
        norms.append(spy.norms)
    # Not equal: the mean of micro-batches weighs tokens by micro-batch.
    assert norms[0] == pytest.approx(norms[1], rel=0.3)
    assert all(1e-3 < norm < 100 for norm in norms[0])


def test_a_stopped_run_goes_on_with_its_path(llama: Path, tmp_path: Path) -> None:
    """Stopped inside of the first and of the second domain: the same importances, bit for bit."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
            if (module.stage.index, trainer.global_step) == stop:
                raise Stopped("SIGKILL")

    options = {"kinds": {"a": "label", "b": "generative"}}

    def run(name: str, *callbacks: Callback) -> tuple[SI, Any]:
        si = SI(strength=10.0)
        _, module = train(tmp_path / name, llama, lora(r=2), {"si": si}, callbacks=callbacks, **options)
        return si, module

    whole, module = run("whole")
    for stop in ((0, 3), (1, 3)):
        with pytest.raises(Stopped):
            run(str(stop), Stop())
        si, resumed = run(str(stop))
        for key in ("precision", "anchor"):
            assert all(torch.equal(named(si, key)[name], t) for name, t in named(whole, key).items())
        wanted = module.adapter.state(module.model)
        assert all(torch.equal(t, wanted[name]) for name, t in resumed.adapter.state(resumed.model).items())


def test_off_remembers_nothing() -> None:
    si, toy = SI(strength=0.0), Toy()
    toy.learn(si, 0.0, steps=2)
    module: Any = toy
    si.on_domain_end(module, STAGE)
    assert all(named(si, key) == {} for key in si.state)
    assert not si.touches_training(0)
    assert SI().touches_training(0)


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"xi": 0.0}], ids=str)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        SI(**options)
