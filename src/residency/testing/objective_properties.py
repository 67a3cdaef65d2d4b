"""What every objective keeps: layouts, micro-batches, values per example, a loss that falls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import Tensor

from residency.adapters import Peft
from residency.core.types import Batch, Branch, Example, GlobalBatch, Layout, Stage
from residency.objectives import Objective
from residency.testing.cases import Case, made
from residency.testing.objective_rows import examples_of
from residency.testing.rows import ObjectiveRow
from residency.testing.tiny_runs import make_module

__all__ = ["PROPERTIES", "batches", "learner", "shift", "step"]

ObjectiveCase = Case[ObjectiveRow]
_TURNS = replace(
    examples_of("completion")[0],
    branches=(Branch(tokens=(7, 8, 9, 10, 11, 0), mask=(True, False, True, False, True, True)),),
)
"""An answer of several turns: not every token of it is supervised."""


def learner(
    backbone: Path,
    make: Callable[[], Objective],
    *,
    layout: Layout | Literal["auto"] = "packed",
    dropout: float = 0.0,
    moved: bool = True,
) -> Any:
    """A module at the start of a stage of LoRA.

    Args:
        backbone: Folder of the tiny model.
        make: The objective.
        layout: Of the batches.
        dropout: Of LoRA.
        moved: A little further on, so that the policy is not the reference.
    """
    adapter = Peft(config=LoraConfig(target_modules=["q_proj", "v_proj"], r=3, lora_alpha=6, lora_dropout=dropout))
    module = make_module(backbone, adapter, {}, objective=make(), layout=layout)
    module.build(seed=0)
    shift(module, 1)
    stage = Stage(index=0, domain="x", stages=1, seed=0, steps=2, batch_size=4)
    module.begin_stage(stage, _stage_examples(module.objective))
    if moved:
        shift(module, 2)
    module.model.train(module.objective.forward_noise)
    return module


def shift(module: Any, seed: int, size: float = 0.2) -> None:
    """Move every trainable parameter by normal draws of a standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, leaf in sorted(module.adapter.trainable(module.model).items()):
            leaf.add_(size * torch.randn(leaf.shape, generator=generator))


def batches(module: Any, size: int) -> list[Batch]:
    """A global batch of four examples in micro-batches."""
    whole = tuple(module.dataset[i] for i in range(4))
    found = []
    for first in range(0, 4, size):
        slots = tuple(range(first, first + size))
        own = module.objective.collate([whole[s] for s in slots], layout=module.layout)
        found.append(replace(own, part_of=GlobalBatch(examples=whole, slots=slots, parts=4 // size)))
    return found


def step(module: Any, size: int = 4) -> tuple[Tensor, Tensor]:
    """Loss and gradient as the Trainer makes them: the means over the micro-batches."""
    losses = []
    for batch in batches(module, size):
        batch = module.objective.prepare(module, batch)
        losses.append(module.objective(module.trained_forward, batch, module.reference_forward).loss)
    loss = torch.stack(losses).mean()
    leaves = module.adapter.trainable(module.model)
    gradients = torch.autograd.grad(loss, [leaves[name] for name in sorted(leaves)])
    return loss.detach(), torch.cat([g.flatten() for g in gradients])


def layouts_and_micro_batches_change_nothing(case: ObjectiveCase) -> None:
    """Packed or padded, in one batch or in several: one loss and one gradient."""
    made(case.row.make, Objective, case.name)
    module = _learner(case)
    loss, gradient = step(module)
    assert gradient.abs().max() > 0, "nothing is learnt"
    # What is written for a step is written anew in another layout, whose rounding the weights of the answers see.
    close = 10.0 if _writes(case) else 1.0
    fresh, padded = _learner(case), _learner(case, layout="padded")
    for other, size in ((fresh, 1), (module, 2), (padded, 4), (padded, 2)):
        again, its = step(other, size)
        torch.testing.assert_close(again, loss, rtol=1e-5 * close, atol=1e-6 * close)
        largest = float(gradient.abs().max())
        torch.testing.assert_close(its, gradient, rtol=1e-4 * close, atol=1e-5 * close * largest)


def examples_sum_to_the_loss(case: ObjectiveCase) -> None:
    """The loss is the sum of the examples' values over the sum of their units; logs carry no gradient."""
    module = _learner(case)
    (batch,) = batches(module, 4)
    batch = module.objective.prepare(module, batch)
    loss = module.objective(module.trained_forward, batch, module.reference_forward).loss
    found = module.objective.losses(module.trained_forward, batch, module.reference_forward)
    units = sum(module.objective.units(e) for e in batch.examples)
    assert found.values.shape == (4,), "one value per example"
    torch.testing.assert_close(found.values.sum() / units, loss)
    for name, value in found.log.items():
        assert not value.requires_grad, f"the logged {name} carries a gradient"
        assert torch.isfinite(value), f"the logged {name} is not finite"
    if _writes(case):
        assert "reward" in found.log, "what writes answers logs their reward"
        return
    values = module.example_losses(batch)
    torch.testing.assert_close(values.sum() / units, loss)
    for i, e in enumerate(batch.examples):
        alone = module.objective.collate([e], layout=module.layout)
        torch.testing.assert_close(module.example_losses(alone)[0], values[i], rtol=1e-5, atol=1e-6)


def without_logits_it_is_the_same(case: ObjectiveCase) -> None:
    """Where nobody else reads the logits, the loss is computed without them."""
    module = _learner(case)
    (batch,) = batches(module, 4)
    batch = module.objective.prepare(module, batch)
    by_logits = module.objective(module.forward, batch, module.reference_forward)
    without = module.objective(module.trained_forward, batch, module.reference_forward)
    torch.testing.assert_close(by_logits.loss, without.loss, rtol=1e-5, atol=1e-6)
    assert by_logits.logits is not None, "given logits, it must hand them on"
    assert {*by_logits.log} == {*without.log}


def a_few_steps_lower_it(case: ObjectiveCase) -> None:
    """Eight steps on one batch; an objective that writes answers is left out, its loss is no measure."""
    if _writes(case):
        return
    module = _learner(case, moved=False)
    leaves = module.adapter.trainable(module.model)
    optimizer = torch.optim.AdamW(leaves.values(), lr=3e-3)
    values = []
    for _ in range(8):
        (batch,) = batches(module, 4)
        batch = module.objective.prepare(module, batch)
        found = module.objective(module.trained_forward, batch, module.reference_forward)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        # A weighted loss may rise while its tokens become likelier.
        value = found.log["nll"] if "weight/ess" in found.log else found.loss.detach()
        values.append(float(value))
    assert all(map(math.isfinite, values)), f"the loss is not finite: {values}"
    assert values[-1] < values[0], f"eight steps did not lower the loss: {values}"


PROPERTIES = (
    layouts_and_micro_batches_change_nothing,
    examples_sum_to_the_loss,
    without_logits_it_is_the_same,
    a_few_steps_lower_it,
)


def _stage_examples(objective: Objective) -> list[Example]:
    found = examples_of(objective.reads)
    if objective.reads == "completion":
        return [*found[1:4], _TURNS]
    return found if objective.reads == "label" else found[:4] * (2 if objective.reads == "prompt" else 1)


def _learner(case: ObjectiveCase, **options: Any) -> Any:
    # Where nothing is drawn in a forward pass, dropout must not be either.
    dropout = 0.0 if case.row.make().forward_noise else 0.3
    return learner(case.runs.backbone, case.row.make, dropout=dropout, **options)


def _writes(case: ObjectiveCase) -> bool:
    return case.row.make().reads in ("prompt", "label")
