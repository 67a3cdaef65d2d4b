"""OGD: to first order, stored outputs do not move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Example, Stage
from residency.engine.module import ContinualModule
from residency.mitigations import OGD
from residency.mitigations.constraints.ogd import extend_basis, project_out
from residency.objectives import SFT

OLD = [Example.of(domain="first", row=str(k), prompt=(5 + k, 9), completion=(70 + k, 8, 0)) for k in range(3)]


def test_gram_schmidt() -> None:
    """Orthonormal, the old rows first, the span of both; what is not new adds nothing."""
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, 12, generator=draw, dtype=torch.float64) for n in (3, 4))
    second[2] = first[0] - 2 * second[1]
    second[3] = 1e-12 * second[3]
    basis = extend_basis(extend_basis(first[:0], first), second)
    assert len(basis) == 6
    torch.testing.assert_close(basis @ basis.T, torch.eye(6, dtype=torch.float64))
    assert torch.equal(basis[:3], extend_basis(first[:0], first))
    for vectors in (first, second):
        assert float((vectors - vectors @ basis.T @ basis).norm()) < 1e-12
        assert float((project_out(vectors[1], basis)).norm()) < 1e-12


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_the_forbidden_part_is_removed(strength: float) -> None:
    draw = torch.Generator().manual_seed(1)
    vectors, step = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((3, 12), (12,)))
    basis = extend_basis(vectors[:0], vectors)
    final = project_out(step, basis, strength=strength)
    torch.testing.assert_close(basis @ final, (1 - strength) * (basis @ step))
    rest = step - basis.T @ (basis @ step)
    torch.testing.assert_close(final - basis.T @ (basis @ final), rest)


def build(folder: Path, **mitigations: Any) -> ContinualModule:
    module = ContinualModule(
        backbone=CausalLM(path=str(folder)),
        adapter=lora(target_modules="all-linear", r=2),
        objective=SFT(),
        mitigations=mitigations,
        layout="packed",
    )
    module.build(seed=0)
    with torch.no_grad():
        for leaf in module.adapter.trainable(module.model).values():
            leaf += 0.05 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
    stage = Stage(index=0, domain="first", stages=2, seed=0, steps=1, batch_size=3)
    module.begin_stage(stage, OLD)
    for mitigation in module.mitigations.values():
        mitigation.on_domain_end(module, stage)
    return module


def outputs(module: ContinualModule, kind: str) -> Tensor:
    """What each stored example must keep, (3,)."""
    module.model.eval()
    batch = make_batch(OLD, layout="packed")
    with torch.no_grad():
        logits = module.forward(batch)
    values = logits if kind == "logit" else logits.log_softmax(-1)
    chosen = values.gather(1, batch.targets[:, None])[:, 0]
    return chosen.new_zeros(3).index_add(0, batch.target_example, chosen)


@pytest.mark.parametrize("kind", ["logit", "log_prob"])
def test_stored_outputs_stay_to_first_order(kind: Any, llama: Path) -> None:
    module = build(llama, ogd=OGD(output=kind))
    ogd = module.mitigations["ogd"]
    leaves = module.adapter.trainable(module.model)
    before = {n: p.detach().clone() for n, p in leaves.items()}
    start = outputs(module, kind)
    draw = torch.Generator().manual_seed(2)
    after = {n: p + 1e-3 * torch.randn(p.shape, generator=draw) for n, p in before.items()}

    def moved(weights: Any) -> float:
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(weights[name])
        return float((outputs(module, kind) - start).norm())

    final = ogd.transform_update(module, before, after)
    assert moved(final) < 0.1 * moved(after)
    assert ogd.metrics_to_log(module)["directions"] == 3
    assert 0.5 < ogd.metrics_to_log(module)["kept"] < 1
    basis: Any = ogd.state["basis"]
    torch.testing.assert_close(basis @ basis.T, torch.eye(3), rtol=0, atol=1e-5)
    step = torch.cat([(final[n] - before[n]).flatten() for n in sorted(final)])
    assert float((basis @ step).norm() / step.norm()) < 1e-4


def test_it_takes_so_many_and_leaves_no_gradient(llama: Path) -> None:
    for examples, kept in ((2, 2), (16, 3)):
        module = build(llama, ogd=OGD(examples=examples))
        assert len(module.mitigations["ogd"].state["basis"]) == kept
        assert all(p.grad is None for p in module.model.parameters())


def test_strength_zero_is_off(llama: Path) -> None:
    module = build(llama, off=OGD(strength=0.0))
    after = {"x": torch.ones(1)}
    assert module.mitigations["off"].transform_update(module, after, after) is after
    assert not module.mitigations["off"].touches_training(1)
    assert OGD().touches_training(1)
    assert not OGD().touches_training(0)


@pytest.mark.parametrize("options", [{"strength": 1.1}, {"strength": -0.1}, {"examples": 0}], ids=str)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        OGD(**options)
