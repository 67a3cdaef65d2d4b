"""L2-SP: towards the start, in the space of the parameters or of the update, through the gradient or beside it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from residency.adapters import Full
from residency.adapters.peft import Peft, lora
from residency.core.errors import UserError
from residency.core.types import Stage
from residency.mitigations import L2SP
from residency.mitigations.penalties.l2_sp import decoupled_update, l2_sp_pull, learning_rates
from residency.mitigations.penalties.quadratic import quadratic_penalty, quadratic_pull
from residency.testing.tiny_runs import make_module, train

SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 4), "head": (5,)}


def random_tensors(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in SHAPES.items()}


def test_pull_is_the_gradient_of_the_penalty() -> None:
    theta, start = random_tensors(0), random_tensors(1)
    for leaf in theta.values():
        leaf.requires_grad_()
    value, pulls = l2_sp_pull(theta, start, alpha=0.1, beta=0.01, new=["head"])
    wanted = 0.05 * (theta["a"] - start["a"]).square().sum() + 0.005 * theta["head"].square().sum()
    assert float(value) == pytest.approx(float(wanted.detach()), rel=1e-6)
    for pull, gradient in zip(pulls.values(), torch.autograd.grad(wanted, list(theta.values())), strict=True):
        torch.testing.assert_close(pull, gradient, rtol=1e-12, atol=0)


def test_it_is_ewc_with_a_fisher_of_one() -> None:
    theta, start = random_tensors(0), random_tensors(1)
    ones = {name: torch.ones_like(t) for name, t in theta.items()}
    value, pulls = l2_sp_pull(theta, start, alpha=0.3)
    assert float(value) == pytest.approx(float(quadratic_penalty(theta, start, ones, strength=0.3)), rel=1e-6)
    for name, wanted in quadratic_pull(theta, start, ones, strength=0.3).items():
        torch.testing.assert_close(pulls[name], wanted)


@pytest.mark.parametrize("form", ["penalty", "decoupled"])
def test_without_a_loss_it_comes_back_to_the_start(form: str) -> None:
    theta, start = random_tensors(0), random_tensors(1)
    for _ in range(400):
        _, pulls = l2_sp_pull(theta, start, alpha=0.5)
        if form == "decoupled":
            theta = decoupled_update(theta, pulls, dict.fromkeys(theta, 0.2))
        else:
            theta = {name: t - 0.2 * pulls[name] for name, t in theta.items()}
    for name, t in theta.items():
        torch.testing.assert_close(t, start[name])


def test_rates_are_those_of_the_groups() -> None:
    leaves = {name: torch.zeros(2, requires_grad=True) for name in "abc"}
    groups = [{"params": [leaves["a"]], "lr": 0.1}, {"params": [leaves["b"]], "lr": 0.5}]
    rates = learning_rates(torch.optim.AdamW(groups), leaves)
    assert rates == {"a": 0.1, "b": 0.5}
    moved = decoupled_update({n: torch.ones(2) for n in "abc"}, {n: torch.ones(2) for n in "abc"}, rates)
    assert [float(moved[n][0]) for n in "abc"] == pytest.approx([0.9, 0.5, 1.0])


STAGE = Stage(index=0, domain="d", stages=2, seed=0, steps=1, batch_size=1)


def started(llama: Path, adapter: Any, **options: Any) -> tuple[L2SP, Any]:
    """A module away from where its stage began."""
    l2_sp = L2SP(**options)
    module = make_module(llama, adapter, {"l2": l2_sp})
    module.build(seed=0)
    move(module, 1)
    module.stage = STAGE
    l2_sp.on_domain_start(module, STAGE)
    move(module, 2)
    return l2_sp, module


def move(module: Any, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in module.adapter.trainable(module.model).values():
            leaf += 0.05 * torch.randn(leaf.shape, generator=draw)


def test_lora_is_pulled_in_the_space_of_the_update(llama: Path) -> None:
    """α/2 ‖ΔW - ΔW*‖², with its gradient for both factors, by autograd on the dense update."""
    l2_sp, module = started(llama, lora(target_modules="all-linear", r=2), alpha=0.7)
    leaves = module.adapter.trainable(module.model)
    start = l2_sp.state["anchor"]
    assert isinstance(start, dict)
    terms = [
        0.35 * (y.scale * (leaves[y.b] @ leaves[y.a] - start[y.b] @ start[y.a])).square().sum()
        for y in module.adapter.low_rank_layers(module.model)
    ]
    wanted = torch.stack(terms).sum()
    found = l2_sp.loss_terms(module, None, None)["penalty"]
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=0)
    gradients = dict(zip(leaves, torch.autograd.grad(wanted, list(leaves.values())), strict=True))
    pulled = l2_sp.transform_gradients(module, {name: torch.zeros_like(t) for name, t in leaves.items()})
    for name, gradient in gradients.items():
        torch.testing.assert_close(pulled[name], gradient, rtol=1e-3, atol=1e-5)
    assert l2_sp.metrics_to_log(module)["distance"] == pytest.approx((2 * float(found) / 0.7) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("made", ["factors", "full", "ia3"])
def test_others_are_pulled_as_parameters(made: str, llama: Path) -> None:
    from support.peft_configs import CONFIGS

    adapter = {"factors": lambda: lora(r=2), "full": Full, "ia3": lambda: Peft(config=CONFIGS["ia3"]())}[made]()
    l2_sp, module = started(llama, adapter, alpha=0.7, space="parameters")
    leaves, start = module.adapter.trainable(module.model), l2_sp.state["anchor"]
    assert isinstance(start, dict)
    pulled = l2_sp.transform_gradients(module, {name: torch.zeros_like(t) for name, t in leaves.items()})
    for name, leaf in leaves.items():
        torch.testing.assert_close(pulled[name], 0.7 * (leaf.detach() - start[name]))


def test_the_anchor_is_where_the_stream_or_the_domain_began(llama: Path) -> None:
    for anchor, first in (("pretrained", True), ("previous", False)):
        l2_sp, module = started(llama, lora(r=2), anchor=anchor)
        assert (l2_sp.loss_terms(module, None, None) != {}) == first == l2_sp.touches_training(0)
        begun = {name: t.clone() for name, t in l2_sp.state["anchor"].items()}  # type: ignore[union-attr]
        module.stage = Stage(index=1, domain="e", stages=2, seed=0, steps=1, batch_size=1)
        l2_sp.on_domain_start(module, module.stage)
        kept = all(torch.equal(begun[name], t) for name, t in l2_sp.state["anchor"].items())  # type: ignore[union-attr]
        assert kept == first
        assert l2_sp.touches_training(1)
        value = float(l2_sp.loss_terms(module, None, None)["penalty"])
        assert (value > 0) == first


def test_decoupled_decay_is_that_of_adamw(llama: Path, tmp_path: Path) -> None:
    """Towards 0, with nothing else: the same as AdamW's own decay up to the order of decay and step."""
    weights = []
    for own, decay in ((0.0, 0.5), (0.5, 0.0)):
        anchored = Origin(alpha=own, space="parameters", decoupled=True)
        options = {"kinds": {"a": "label"}, "steps": 5}
        module = _with_decay(tmp_path / str(own), llama, anchored, decay, options)
        weights.append(torch.cat([t.flatten() for t in module.adapter.state(module.model).values()]))
    without = _with_decay(tmp_path / "none", llama, Origin(alpha=0.0), 0.0, {"kinds": {"a": "label"}, "steps": 5})
    plain = torch.cat([t.flatten() for t in without.adapter.state(without.model).values()])
    effect = weights[0] - plain
    assert float((weights[1] - weights[0]).norm()) < 0.1 * float(effect.norm())


class Origin(L2SP):
    """Anchored at 0."""

    def on_domain_start(self, module: Any, stage: Stage) -> None:
        """As said."""
        self.state["anchor"] = {n: torch.zeros_like(t) for n, t in module.adapter.trainable(module.model).items()}


def _with_decay(folder: Path, llama: Path, l2_sp: L2SP, decay: float, options: dict[str, Any]) -> Any:
    from residency.testing import tiny_runs as running

    made = running.make_module

    def make(*args: Any, **more: Any) -> Any:
        module = made(*args, **more)
        module.optimizer_factory = lambda leaves: torch.optim.AdamW(leaves, lr=1e-2, weight_decay=decay)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "make_module", make)
        return train(folder, llama, lora(r=2), {"l2": l2_sp}, **options)[1]


def test_off_is_off() -> None:
    for options in ({"alpha": 0.0}, {"alpha": 0.0, "beta": 0.1}, {"alpha": 0.0, "decoupled": True}):
        l2_sp = L2SP(**options)
        module: Any = SimpleNamespace(stage=STAGE)
        gradients = {"x": torch.ones(1)}
        assert l2_sp.loss_terms(module, None, None) == {}
        assert l2_sp.transform_gradients(module, gradients) is gradients
        assert l2_sp.transform_update(module, gradients, gradients) is gradients
        assert not l2_sp.touches_training(0)
        assert not l2_sp.touches_training(1)
    assert L2SP(alpha=0.0, beta=0.1, new=["head"]).touches_training(1)


@pytest.mark.parametrize("options", [{"alpha": -1.0}, {"beta": -1.0}], ids=str)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        L2SP(**options)
