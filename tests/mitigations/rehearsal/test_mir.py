"""Interference: the definition, on a model, with nothing left behind; and the batch that it makes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from residency.adapters.peft import lora
from residency.core.batching import make_batch
from residency.core.tensors import snapshot
from residency.core.types import Example, Stage
from residency.mitigations import Replay
from residency.mitigations.rehearsal.mir import interference, most_interfered, virtual_step
from residency.mitigations.rehearsal.model_views import example_loss
from residency.testing.tiny_runs import make_module


def make_examples(domain: str, rows: int) -> list[Example]:
    return [Example.of(domain=domain, row=str(i), prompt=(7 * i + 3, 1), completion=(i + 5, 9, 0)) for i in range(rows)]


@pytest.fixture
def module(llama_dropout: Path) -> Any:
    built = make_module(llama_dropout, lora(target_modules=["q_proj", "v_proj"], r=2), {})
    built.build(seed=0)
    torch.manual_seed(0)
    for leaf in built.adapter.trainable(built.model).values():
        torch.nn.init.normal_(leaf, std=0.3)
    built.stage = Stage(index=1, domain="new", stages=2, seed=0, steps=4, batch_size=4)
    built.model.train()
    return built


def test_a_virtual_step_goes_down_the_gradient() -> None:
    parameters = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    gradients = {"a": torch.tensor([3.0, 0.0, 0.0]), "b": torch.tensor([[0.0, 4.0], [0.0, 0.0]])}
    moved = virtual_step(parameters, gradients, size=0.1)
    step = torch.cat([(moved[n] - parameters[n]).flatten() for n in moved])
    torch.testing.assert_close(step, -0.1 * math.sqrt(7) * torch.tensor([0.6, 0, 0, 0, 0.8, 0, 0]))
    still = virtual_step(parameters, {n: torch.zeros_like(g) for n, g in gradients.items()}, size=0.1)
    assert all(torch.equal(still[n], parameters[n]) for n in parameters)


def test_interference_is_the_rise_of_the_loss(module: Any) -> None:
    """Against a second computation: the weights moved by hand; and to first order g · g'."""
    new, old = make_examples("new", 3), make_examples("old", 6)
    leaves = module.adapter.trainable(module.model)
    before, grads, random = snapshot(leaves), [leaf.grad for leaf in leaves.values()], torch.get_rng_state()
    rise = interference(module, new, old, size=1e-3)
    assert module.model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[n], leaf) for n, leaf in leaves.items())
    assert [leaf.grad for leaf in leaves.values()] == grads

    module.model.eval()

    def gradient(examples: list[Example]) -> Any:
        loss = module.objective(module.forward, make_batch(examples, layout=module.layout), None).loss
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    own = gradient(new)
    first = example_loss(module, old)
    slopes = [gradient([e]) for e in old]
    with torch.no_grad():
        for name, value in virtual_step(leaves, own, size=1e-3).items():
            leaves[name].copy_(value)
    torch.testing.assert_close(rise, example_loss(module, old) - first, rtol=0, atol=1e-6)
    norm, count = math.sqrt(sum(float(g.square().sum()) for g in own.values())), sum(g.numel() for g in own.values())
    linear = torch.tensor([-sum(float((s[n] * own[n]).sum()) for n in own) for s in slopes])
    torch.testing.assert_close(rise, 1e-3 * math.sqrt(count) / norm * linear, rtol=0.1, atol=2e-4)


def test_the_most_interfered_come_first() -> None:
    rise = torch.tensor([0.1, 0.5, -0.2, 0.5])
    assert most_interfered(rise, 3) == [1, 3, 0]
    assert most_interfered(rise[:2], 5) == [1, 0, 1, 0, 1], "few candidates come again"


def test_a_batch_gets_the_worst_candidates_in_the_old_ones_places(module: Any) -> None:
    old, new = make_examples("old", 9), make_examples("new", 2)
    replay = Replay(draw="mir", capacity=9, candidates=9, virtual_step=1e-3)
    module.dataset = old
    replay.on_domain_end(module, Stage(index=0, domain="old", stages=2, seed=0, steps=4, batch_size=4))
    batch = make_batch([new[0], old[0], old[1], new[1]], layout=module.layout)
    chosen = replay.transform_batch(module, batch).examples
    rise = interference(module, new, old, size=1e-3)
    assert [chosen[0], chosen[3]] == new
    assert [*chosen[1:3]] == [old[i] for i in most_interfered(rise, 2)]
    assert replay.transform_batch(module, batch).examples == chosen, "a function of seed, step and batch"
    for one_sided in (new, old[:2]):
        plain = make_batch(one_sided, layout=module.layout)
        assert replay.transform_batch(module, plain) is plain
    assert Replay(draw="uniform").transform_batch(module, batch) is batch
