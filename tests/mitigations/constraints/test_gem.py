"""A-GEM and GEM: what is left of a gradient does not point against the past."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from residency.adapters import Full
from residency.backbones import CausalLM
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Example, Stage
from residency.engine.module import ContinualModule
from residency.mitigations import AGEM, GEM
from residency.mitigations.constraints.gradient_projection import (
    dual_weights,
    inner,
    project_agem,
    project_gem,
    reference_gradient,
)
from residency.mitigations.rehearsal.memory import unpack_examples
from residency.objectives import SFT

Named = dict[str, Tensor]
SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 4), "b": (5,), "c": ()}


def vector(seed: int) -> Named:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in SHAPES.items()}


def flat(named: Any) -> Tensor:
    return torch.cat([t.flatten() for t in named.values()])


def against(gradient: Named, seed: int) -> Named:
    """A reference that the gradient points against."""
    reference = vector(seed)
    return reference if inner(gradient, reference) < 0 else {n: -t for n, t in reference.items()}


# --- A-GEM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_agem_removes_what_points_against_the_past(seed: int) -> None:
    gradient, reference = vector(seed), vector(seed + 100)
    final = project_agem(gradient, reference)
    assert float(inner(final, reference)) >= -1e-6
    assert float(flat(final).norm()) <= float(flat(gradient).norm())
    if inner(gradient, reference) >= 0:
        assert final is gradient
    else:
        assert abs(float(inner(final, reference))) < 1e-12, "and no more than that"
        wanted = flat(gradient) - flat(gradient) @ flat(reference) / flat(reference).norm() ** 2 * flat(reference)
        torch.testing.assert_close(flat(final), wanted)
        torch.testing.assert_close(flat(project_agem(final, reference)), flat(final))
        half = project_agem(gradient, reference, strength=0.5)
        torch.testing.assert_close(flat(half), (flat(gradient) + flat(final)) / 2)


def test_agem_without_a_reference_gradient() -> None:
    gradient = vector(0)
    assert project_agem(gradient, {n: torch.zeros_like(t) for n, t in gradient.items()}) is gradient


# --- GEM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_one_constraint_is_agem(seed: int) -> None:
    gradient = vector(seed)
    reference = against(gradient, seed + 100)
    final = project_gem(gradient, [reference], margin=0.0, ridge=0.0)
    torch.testing.assert_close(flat(final), flat(project_agem(gradient, reference)))


@pytest.mark.parametrize("constraints", [2, 3, 6])
def test_gem_meets_every_constraint_and_moves_least(constraints: int) -> None:
    for seed in range(10):
        gradient = vector(seed)
        references = [against(gradient, 100 * seed + k + 1) for k in range(constraints)]
        final = project_gem(gradient, references, margin=0.0, ridge=0.0)
        products = torch.stack([inner(final, r) for r in references])
        assert float(products.min()) >= -1e-6
        assert float(flat(final).norm()) <= float(flat(gradient).norm()) + 1e-9
        torch.testing.assert_close(flat(project_gem(final, references, margin=0.0, ridge=0.0)), flat(final))
        # Karush, Kuhn and Tucker: the correction is a sum of the references that hold it, with weights >= 0.
        correction = flat(final) - flat(gradient)
        active = torch.stack([flat(r) for r, p in zip(references, products, strict=True) if p < 1e-9]).T
        weights = torch.linalg.lstsq(active, correction[:, None]).solution
        torch.testing.assert_close(active @ weights, correction[:, None])
        assert float(weights.min()) >= -1e-9


def test_gem_that_agrees_is_left_alone() -> None:
    gradient = vector(0)
    references = [{n: -t for n, t in against(gradient, k).items()} for k in (1, 2)]
    assert project_gem(gradient, references, margin=0.5) is gradient


def test_the_programme_by_projected_gradient_descent() -> None:
    for seed in range(5):
        draw = np.random.default_rng(seed)
        vectors = draw.normal(size=(4, 9))
        gram, products = vectors @ vectors.T, draw.normal(size=4)
        q = gram + 1e-3 * np.trace(gram) / 4 * np.eye(4)
        v = np.full(4, 0.5)
        for _ in range(20_000):
            v = np.maximum(0.5, v - (q @ v + products) / np.linalg.norm(q, 2))
        np.testing.assert_allclose(dual_weights(gram, products, margin=0.5, ridge=1e-3), v, atol=1e-6)


def test_a_margin_favours_the_past() -> None:
    gradient = vector(3)
    references = [against(gradient, k) for k in (4, 5)]
    plain, margin = (project_gem(gradient, references, margin=m) for m in (0.0, 0.5))
    assert sum(inner(margin, r) for r in references) > sum(inner(plain, r) for r in references)


def test_equal_and_parallel_constraints_are_no_trouble() -> None:
    gradient = vector(0)
    reference = against(gradient, 1)
    twice = project_gem(gradient, [reference, dict(reference)], margin=0.0, ridge=0.0)
    torch.testing.assert_close(flat(twice), flat(project_agem(gradient, reference)))


def test_the_ridge_does_not_know_the_scale() -> None:
    """Gradients a thousand times smaller are projected in the same way: an absolute ridge would switch GEM off."""
    gradient = vector(0)
    references = [against(gradient, k) for k in (1, 2)]
    small = [{n: 1e-3 * t for n, t in r.items()} for r in references]
    final = flat(project_gem(gradient, references, margin=0.0))
    tiny = flat(project_gem({n: 1e-3 * t for n, t in gradient.items()}, small, margin=0.0))
    torch.testing.assert_close(1e3 * tiny, final)


# --- in a language model ----------------------------------------------------------------------------------------------

EXAMPLES = {
    domain: [
        Example.of(
            domain=domain, row=str(k), prompt=tuple(range(a + k, a + 3 + 2 * k)), completion=tuple(range(a, a + 1 + k))
        )
        for k in range(6)
    ]
    for domain, a in (("first", 5), ("second", 60))
}


def build(folder: Path, **mitigations: Any) -> ContinualModule:
    module = ContinualModule(
        backbone=CausalLM(path=str(folder)), adapter=Full(), objective=SFT(), mitigations=mitigations
    )
    module.build(seed=0)
    return module


def finish(module: ContinualModule, index: int, domain: str) -> Stage:
    stage = Stage(index=index, domain=domain, stages=3, seed=0, steps=2, batch_size=4)
    other = EXAMPLES["first" if domain == "second" else "second"]
    module.begin_stage(stage, [*EXAMPLES[domain], *other[:2], *EXAMPLES[domain][:2]])
    for mitigation in module.mitigations.values():
        mitigation.on_domain_end(module, stage)
    return stage


def gradient_of(module: ContinualModule, examples: list[Example]) -> Named:
    leaves = module.adapter.trainable(module.model)
    module.model.eval()
    loss = SFT()(module.forward, make_batch(examples, layout=module.layout), None).loss
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_reference_gradient_is_that_of_the_objective(batch_tokens: int, llama_dropout: Path) -> None:
    module = build(llama_dropout)
    wanted = gradient_of(module, EXAMPLES["first"])
    module.model.train()
    found = reference_gradient(module, EXAMPLES["first"], list(wanted), batch_tokens=batch_tokens)
    assert float((flat(found) - flat(wanted)).norm() / flat(wanted).norm()) < 1e-5
    assert module.model.training
    assert all(p.grad is None for p in module.model.parameters())


@pytest.mark.parametrize("kind", [AGEM, GEM])
def test_a_step_against_the_past_is_turned(kind: Any, llama: Path) -> None:
    module = build(llama, gem=kind(samples=6), off=kind(strength=0.0))
    finish(module, 0, "first")
    finish(module, 1, "second")
    module.stage = Stage(index=2, domain="third", stages=3, seed=0, steps=2, batch_size=4)
    gem, off = module.mitigations.values()
    past = {d: gradient_of(module, EXAMPLES[d]) for d in ("first", "second")}
    worst = {n: -past["first"][n] - past["second"][n] for n in past["first"]}
    assert off.transform_gradients(module, worst) is worst
    final = gem.transform_gradients(module, worst)
    if kind is GEM:
        # With a ridge r a constraint of weight v gives in by r · mean ‖p‖² · v, and here v <= 1.
        slack = gem.ridge * sum(float(inner(p, p)) for p in past.values()) / len(past)
        assert all(float(inner(final, p)) >= -1.001 * slack for p in past.values())
    else:
        assert float(flat(final).norm()) < 0.9 * float(flat(worst).norm())
    assert gem.metrics_to_log(module)["projected"] == 1.0
    good = {n: -t for n, t in worst.items()}
    assert gem.transform_gradients(module, good) is good
    assert gem.metrics_to_log(module)["projected"] == 0.5
    assert not off.touches_training(1)
    assert gem.touches_training(1)
    assert not gem.touches_training(0)


def test_the_memories(llama: Path) -> None:
    """A reservoir over all domains; so many of every domain; rows of the domain that was learned, each once."""
    held = {}
    for name, made in {"agem": AGEM(capacity=8), "gem": GEM(capacity=4)}.items():
        module = build(llama, **{name: made})
        finish(module, 0, "first")
        finish(module, 1, "second")
        held[name] = unpack_examples(made.state["buffer"])  # type: ignore[arg-type]
    assert {name: len(memory) for name, memory in held.items()} == {"agem": 8, "gem": 8}
    assert [e.domain for e in held["gem"]] == ["first"] * 4 + ["second"] * 4
    for memory in held.values():
        assert len({*memory}) == len(memory)
        assert {*memory} <= {*EXAMPLES["first"], *EXAMPLES["second"]}


def test_the_first_domain_is_left_alone(llama: Path) -> None:
    gradient = {"x": torch.ones(1)}
    for made in (AGEM(), GEM()):
        assert made.transform_gradients(build(llama, x=made), gradient) is gradient


@pytest.mark.parametrize("kind", [AGEM, GEM])
@pytest.mark.parametrize(
    "options", [{"strength": 1.5}, {"strength": -0.1}, {"capacity": 0}, {"samples": 0}, {"batch_tokens": 0}], ids=str
)
def test_wrong_options_are_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        kind(**options)


@pytest.mark.parametrize("options", [{"margin": -1.0}, {"ridge": -1.0}], ids=str)
def test_wrong_options_of_the_programme_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        GEM(**options)
