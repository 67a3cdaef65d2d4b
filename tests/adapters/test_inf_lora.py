"""InfLoRA: what earlier inputs span is left alone, by construction and not by luck of the optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from residency.adapters import InfLoRA
from residency.adapters.algebra.covariance import input_covariances, tokens_of
from residency.adapters.algebra.dual_gpm import Memory, directions, energy_threshold, project, remember
from residency.adapters.inf_lora import _layers, _memory
from residency.core.batching import make_batch
from residency.core.errors import UserError
from support.stages_without_trainer import go, observing, stage
from support.tuned_models import EXAMPLES, attach, learn, logits

TARGETS = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def inf_lora(kind: str = "llama", **options: Any) -> InfLoRA:
    more = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    return InfLoRA(config=LoraConfig(target_modules=TARGETS[kind], r=3, lora_alpha=6, **more), **options)


def covariance(*, seed: int, size: int = 12, tokens: int = 40, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, rank or size, generator=generator) @ torch.randn(rank or size, size, generator=generator)
    return x.T @ x


def test_threshold_grows_to_its_end() -> None:
    assert energy_threshold(1, 4, first=0.9, last=1.0) == pytest.approx(0.925)
    assert energy_threshold(4, 4, first=0.9, last=1.0) == 1.0


def test_memory_in_closed_form() -> None:
    """Energies 5, 3, 1, 1 of 10: two axes hold 0.8 of it, and 0.81 needs a third, so that one is left."""
    c = torch.diag(torch.tensor([5.0, 1, 3, 1]))
    two = remember(None, c, threshold=0.8)
    assert (two.used, two.free) == (2, True)
    torch.testing.assert_close(project(torch.eye(4), two), torch.diag(torch.tensor([0.0, 1, 0, 1])))
    one = remember(None, c, threshold=0.5)
    assert (one.used, one.free) == (1, False), "the smaller basis is kept"
    torch.testing.assert_close(project(torch.eye(4), one), torch.diag(torch.tensor([0.0, 1, 1, 1])))
    assert remember(None, c, threshold=0.81).used == 3
    assert remember(None, c, threshold=1.0).used == 4


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_memory_grows_stays_orthonormal_and_holds_the_energy(threshold: float) -> None:
    memory: Memory | None = None
    used, kinds = [0], set()
    for seed in range(5):
        c = covariance(seed=seed, rank=4)
        memory = remember(memory, c, threshold=threshold)
        basis = memory.basis
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)
        outside = project(project(c, memory).T, memory).trace() / c.trace()
        assert float(outside) <= 1 - threshold + 1e-5
        assert basis.shape[1] <= len(c) // 2
        used.append(memory.used)
        kinds.add(memory.free)
    assert used == sorted(used)
    assert used[-1] > used[1]
    assert threshold == 0.5 or kinds == {False, True}, "both kinds of memory were to be met"


@pytest.mark.parametrize("free", [False, True], ids=["remove", "retain"])
def test_directions_avoid_the_memory(free: bool) -> None:
    basis = torch.linalg.qr(torch.randn(12, 5, generator=torch.Generator().manual_seed(1))).Q
    a = directions(covariance(seed=2), Memory(basis, free), rank=3)
    torch.testing.assert_close(a @ a.T, torch.eye(3), rtol=0, atol=1e-5)
    inside = a @ basis if not free else a - a @ basis @ basis.T
    assert float(inside.abs().max()) <= 1e-5


def test_directions_without_a_memory_are_the_largest_ones() -> None:
    a = directions(torch.diag(torch.tensor([1.0, 9, 4])), None, rank=2)
    torch.testing.assert_close(a.abs(), torch.tensor([[0.0, 1, 0], [0, 0, 1]]))


def test_where_nothing_is_free_nothing_is_learnt() -> None:
    basis = torch.eye(6)[:, :2]
    a = directions(covariance(seed=0, size=6), Memory(basis, True), rank=4)
    assert [float(row.norm().round(decimals=5)) for row in a] == [1, 1, 0, 0]


def test_padding_does_not_count(llama: Path) -> None:
    """Padded and packed rows of the same examples have the same inputs."""
    model = attach(llama, inf_lora())
    found = []
    for layout in ("padded", "packed"):
        shared, covariances = input_covariances(_layers(model), observing(model, layout))  # type: ignore[arg-type]
        found.append(covariances)
    assert {*found[0]} == {*found[1]}
    for path, c in found[0].items():
        torch.testing.assert_close(c, found[1][path], rtol=1e-4, atol=1e-4)
    key = next(path for path in shared if path.endswith("k_proj"))
    assert shared[key] == key.replace("k_proj", "q_proj"), "one input, one covariance"
    batch = make_batch(EXAMPLES, layout="padded")
    assert len(tokens_of(batch.input_ids[..., None], batch)) == batch.tokens < batch.input_ids.numel()


OPTIMIZERS = [
    lambda leaves, lr: torch.optim.AdamW(leaves, lr=lr, weight_decay=0.5),
    lambda leaves, lr: torch.optim.SGD(leaves, lr=lr, momentum=0.9),
]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["adamw", "sgd"])
def test_inputs_of_earlier_domains_are_left_alone(kind: str, optimizer: Any, request: pytest.FixtureRequest) -> None:
    adapter = inf_lora(kind, energy=0.9)
    model = go(attach(request.getfixturevalue(kind), adapter), adapter, 1)
    memories = {path: _memory(layer) for path, layer in _layers(model).items()}
    assert any(memories.values()), "something was to be remembered"
    adapter.begin_stage(model, stage(1), observing(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert {*adapter.trainable(model)} == {name for name in before if ".lora_B.block001." in name}
    learn(model, optimizer=optimizer, lr=0.1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {*adapter.trainable(model)}
    for path, memory in memories.items():
        if memory is None:
            continue
        layer: Any = model.get_submodule(path)
        update = (layer.lora_B["block001"].weight @ layer.lora_A["block001"].weight).detach()
        assert float(update.abs().max()) > 1e-4
        earlier = memory.basis if not memory.free else torch.eye(len(memory.basis)) - memory.basis @ memory.basis.T
        assert float((update @ earlier).abs().max()) <= 1e-5 * float(update.abs().max())


def test_a_is_orthonormal_over_root_three_and_b_starts_at_zero(llama: Path) -> None:
    adapter = inf_lora()
    model = attach(llama, adapter)
    plain = logits(model)
    adapter.begin_stage(model, stage(0), observing(model))
    for layer in _layers(model).values():
        a = layer.lora_A["block000"].weight
        torch.testing.assert_close(a @ a.T, torch.eye(3) / 3, rtol=0, atol=1e-5)
    assert torch.equal(logits(model), plain)


def test_the_last_domain_is_not_remembered_and_numbers_say_what_is_used(llama: Path) -> None:
    adapter = inf_lora(energy=0.8)
    model = attach(llama, adapter)
    assert adapter.metrics_to_log(model, stage(0)) == {"used": 0.0}
    go(model, adapter, 2)
    used, state = adapter.metrics_to_log(model, stage(1))["used"], adapter.state(model)
    assert 0 < used < 1
    adapter.begin_stage(model, stage(2), observing(model))
    adapter.end_stage(model, stage(2), observing(model))
    assert adapter.metrics_to_log(model, stage(2))["used"] == used
    assert sum("input_memory_is_free" in name for name in state) == 4, "q and k share theirs, of two layers"


def test_a_mixture_keeps_a_and_is_held_exactly(llama: Path) -> None:
    adapter = inf_lora()
    model = go(attach(llama, adapter), adapter, 2)
    state = {name: tensor.clone() for name, tensor in adapter.state(model).items()}
    half = {name: tensor * 0.5 if ".lora_B.block001." in name else tensor for name, tensor in state.items()}
    mixture = {name: tensor.clone() for name, tensor in adapter.weights(model, half).items()}
    assert adapter.load_weights(model, mixture)["truncation"] < 1e-5
    for name, tensor in adapter.state(model).items():
        torch.testing.assert_close(tensor, half[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("energy", "end"), [(0.0, 1.0), (0.9, 1.1), (0.9, 0.8)])
def test_energies_are_shares(energy: float, end: float) -> None:
    with pytest.raises(UserError, match="energy_at_end <= 1"):
        inf_lora(energy=energy, energy_at_end=end)
