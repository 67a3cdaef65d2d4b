"""GPM: earlier inputs are mapped to what they were, under any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from residency.adapters import Adapter, Full
from residency.adapters.algebra.dual_gpm import Memory, project, remember
from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Example, Layout, Stage
from residency.engine.module import ContinualModule
from residency.mitigations import GPM
from residency.mitigations.constraints.gpm import project_update
from residency.mitigations.constraints.linear_maps import LinearMap, linear_maps, passes
from residency.objectives import SFT

PLACE = LinearMap(kind="weight", owner="w", layer="w", transposed=False)
ALL = 1 - 1e-6  # of the energy: a covariance in float32 has as much in directions without inputs
TRANSPOSED = LinearMap(kind="weight", owner="w", layer="w", transposed=True)


def memory_of(inputs: Tensor, energy: float = 1.0) -> Memory:
    return remember(None, inputs.T @ inputs, threshold=energy)


# --- closed forms -----------------------------------------------------------------------------------------------------


def regression() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = np.random.default_rng(0)
    x1, x2, w1, w2 = (draw.normal(size=size) for size in ((8, 32), (8, 32), 32, 32))
    x1, x2, y1, y2 = (torch.from_numpy(a) for a in (x1, x2, x1 @ w1, x2 @ w2))
    return x1, x2, y1, y2


def test_naive_regression_forgets_by_the_overlap_of_inputs() -> None:
    """C1: the domains' minimum-norm solutions, one after the other."""
    x1, x2, y1, y2 = regression()
    theta = torch.linalg.pinv(x1) @ y1
    step = torch.linalg.pinv(x2) @ (y2 - x2 @ theta)
    assert float((x1 @ (theta + step) - y1).square().mean()) == pytest.approx(9.532588085595, rel=1e-9)
    assert float((x1 @ step).square().mean()) == pytest.approx(9.532588085595, rel=1e-9)


def test_regression_with_projected_updates_forgets_nothing_and_learns_all() -> None:
    """C2: gradient descent on the second domain, every update projected."""
    x1, x2, y1, y2 = regression()
    theta = torch.linalg.pinv(x1) @ y1
    memory = memory_of(x1)
    assert memory.used == 8
    rate = 1.0 / float(torch.linalg.matrix_norm(x2, 2) ** 2)
    for _ in range(1000):
        after = theta - rate * (x2.T @ (x2 @ theta - y2))
        theta = project_update(theta[None], after[None], memory, PLACE)[0]
    assert float((x1 @ theta - y1).square().mean()) < 1e-24
    assert float((x2 @ theta - y2).square().mean()) < 1e-20


@pytest.mark.parametrize("place", [PLACE, TRANSPOSED], ids=["out,in", "in,out"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_leaves_the_subspace_unless_its_update_is_projected(place: LinearMap, decay: float) -> None:
    """C11: projected gradients are not enough."""
    torch.manual_seed(0)
    size, out = 32, 6
    old = torch.randn(8, size, dtype=torch.float64)
    memory = memory_of(old)
    basis = memory.basis
    shape = (size, out) if place.transposed else (out, size)

    def inside(step: Tensor) -> float:
        return float((basis.T @ place.by_input(step)).norm() / step.norm())

    leaks = {}
    for projected in ("gradient", "update"):
        weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=decay)
        outputs = (old @ place.by_input(weight)).detach()
        worst = 0.0
        for _ in range(20):
            gradient = torch.randn(shape, dtype=torch.float64)
            if projected == "gradient":
                gradient = place.by_input(project(place.by_input(gradient), memory))
            weight.grad = gradient
            before = weight.detach().clone()
            optimizer.step()
            if projected == "update":
                with torch.no_grad():
                    weight.copy_(project_update(before, weight, memory, place))
            worst = max(worst, inside(weight.detach() - before))
        leaks[projected] = worst
        moved = float((old @ place.by_input(weight.detach()) - outputs).norm() / outputs.norm())
        assert (moved < 1e-13) == (projected == "update")
    assert leaks["update"] < 1e-12, "up to the rounding of W + step"
    assert leaks["gradient"] > 0.1


def test_the_memory_is_orthonormal_and_holds_the_energy() -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(40, 24, dtype=torch.float64) * torch.logspace(0, -2, 24) for _ in range(2))
    memory = remember(memory_of(first, 0.95), second.T @ second, threshold=0.953)
    torch.testing.assert_close(memory.basis.T @ memory.basis, torch.eye(memory.basis.shape[1], dtype=torch.float64))
    for inputs, energy in ((first, 0.95), (second, 0.953)):
        rest = project(inputs.T, memory)
        assert 1 - float(rest.square().sum() / inputs.square().sum()) >= energy - 1e-9
    assert 0 < memory.used < 24
    assert memory_of(first, 0.0).used == 0


# --- in a language model ----------------------------------------------------------------------------------------------

OLD = [Example.of(domain="first", row="0", prompt=(5, 9), completion=(70, 8, 0))]
NEW = [Example.of(domain="second", row="0", prompt=(30, 31, 32), completion=(90, 91, 0))]
MADE: dict[str, Callable[[], Adapter]] = {"lora": lambda: lora(target_modules="all-linear", r=8), "full": Full}


def build(folder: Path, adapter: str, layout: Layout = "packed", **mitigations: Any) -> ContinualModule:
    module = ContinualModule(
        backbone=CausalLM(path=str(folder)),
        adapter=MADE[adapter](),
        objective=SFT(),
        mitigations=mitigations,
        layout=layout,
    )
    module.build(seed=0)
    with torch.no_grad():
        for leaf in module.adapter.trainable(module.model).values():
            leaf += 0.05 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
    return module


def finish(module: ContinualModule, index: int = 0, examples: list[Example] = OLD) -> None:
    stage = Stage(index=index, domain=examples[0].domain, stages=2, seed=0, steps=1, batch_size=1)
    module.begin_stage(stage, examples)
    for mitigation in module.mitigations.values():
        mitigation.on_domain_end(module, stage)


def logits(module: ContinualModule, examples: list[Example]) -> Tensor:
    module.model.eval()
    with torch.no_grad():
        return module.forward(make_batch(examples, layout=module.layout)).clone()


def train(module: ContinualModule, transform: Any, steps: int = 3) -> None:
    """AdamW with decay on the new domain; every update goes through `transform(before, after)`."""
    leaves = module.adapter.trainable(module.model)
    optimizer = torch.optim.AdamW(list(leaves.values()), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        SFT()(module.forward, make_batch(NEW, layout=module.layout), None).loss.backward()
        before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        optimizer.step()
        with torch.no_grad():
            final = transform(before, {name: leaf.detach().clone() for name, leaf in leaves.items()})
            for name, leaf in leaves.items():
                leaf.copy_(final[name])
    module.model.zero_grad()


@pytest.mark.parametrize(
    ("adapter", "architecture", "layout"),
    [
        ("full", "llama", "packed"),
        ("full", "llama", "padded"),
        ("full", "gpt2", "padded"),
        ("lora", "llama", "packed"),
        ("lora", "llama", "padded"),
    ],
)
def test_what_was_learned_is_computed_as_before(
    adapter: str, architecture: str, layout: Layout, request: pytest.FixtureRequest
) -> None:
    """With all energy remembered the whole function stays on old inputs, and goes on learning elsewhere."""
    module = build(request.getfixturevalue(architecture), adapter, layout, gpm=GPM(energy=ALL))
    finish(module)
    old, new = logits(module, OLD), logits(module, NEW)
    gpm = module.mitigations["gpm"]
    train(module, lambda before, after: gpm.transform_update(module, before, after))
    learned = float((logits(module, NEW) - new).abs().max())
    assert learned > 1e-2
    assert float((logits(module, OLD) - old).abs().max()) < 2e-3 * learned
    assert 0 < gpm.metrics_to_log(module)["kept"] < 1
    assert 0 < gpm.metrics_to_log(module)["used"] < 1


@pytest.mark.parametrize("only", ["A", "B"])
def test_one_factor_of_lora_alone_would_not_do(only: str, llama: Path) -> None:
    module = build(llama, "lora", gpm=GPM(energy=ALL))
    finish(module)
    old = logits(module, OLD)

    def transform(before: Any, after: Any) -> Any:
        final = module.mitigations["gpm"].transform_update(module, before, after)
        return {name: final[name] if f"lora_{only}" in name else after[name] for name in after}

    train(module, transform)
    assert float((logits(module, OLD) - old).abs().max()) > 1e-2


@pytest.mark.parametrize("rest", ["frozen", "free"])
def test_what_has_no_inputs_rests_or_not(rest: Any, llama: Path) -> None:
    module = build(llama, "full", gpm=GPM(rest=rest))
    finish(module)
    leaves = module.adapter.trainable(module.model)
    before = {n: p.detach().clone() for n, p in leaves.items()}
    final = module.mitigations["gpm"].transform_update(module, before, {n: p + 1 for n, p in before.items()})
    others = {*leaves} - {*linear_maps(module.model, leaves)}
    assert any("norm" in n for n in others)
    assert any("embed" in n for n in others)
    assert {torch.equal(final[n], before[n]) for n in others} == {rest == "frozen"}


def test_inputs_are_those_that_the_layers_see(llama: Path) -> None:
    """The memory of a layer spans its inputs, found here by another way."""
    module = build(llama, "full", gpm=GPM(energy=ALL))
    finish(module)
    seen = []
    path = "model.layers.1.mlp.down_proj"
    hook = module.model.get_submodule(path).register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    list(passes(module, OLD))
    hook.remove()
    memory = module.mitigations["gpm"].memories()[path]  # type: ignore[attr-defined]
    inputs = seen[0].flatten(0, -2).double()
    assert memory.used == len(inputs) == 4
    assert float(project(inputs.T, memory).norm() / inputs.norm()) < 1e-4


def test_the_memory_grows_and_so_does_the_threshold(llama: Path) -> None:
    module = build(llama, "full", slow=GPM(energy=0.5, growth=0.0), fast=GPM(energy=0.5, growth=0.45))
    finish(module)
    before = {name: m.metrics_to_log(module)["used"] for name, m in module.mitigations.items()}
    finish(module, 1, NEW)
    after = {name: m.metrics_to_log(module)["used"] for name, m in module.mitigations.items()}
    assert before["slow"] == before["fast"] > 0
    assert before["slow"] <= after["slow"] < after["fast"]


def test_no_energy_is_off(llama: Path) -> None:
    module = build(llama, "full", gpm=GPM(energy=0.0))
    finish(module)
    after = {"x": torch.ones(1)}
    assert module.mitigations["gpm"].transform_update(module, after, after) is after
    assert not module.mitigations["gpm"].touches_training(1)
    assert GPM().touches_training(1)
    assert not GPM().touches_training(0)


@pytest.mark.parametrize("options", [{"energy": 1.1}, {"energy": -0.1}, {"growth": -1.0}, {"samples": 0}], ids=str)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        GPM(**options)


@pytest.mark.parametrize("options", [{"use_dora": True}])
def test_dora_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="needs linear"):
        ContinualModule(
            backbone=CausalLM(path="x"), adapter=lora(r=2, **options), objective=SFT(), mitigations={"gpm": GPM()}
        )
