"""MAS: the closed form of a linear model, hidden states where they mean something, and the sum over domains."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from residency.adapters import Full
from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Batch, Example, Layout, Stage
from residency.engine.module import ContinualModule
from residency.mitigations import MAS
from residency.mitigations.penalties.fisher import mean_over_examples
from residency.mitigations.penalties.mas import hidden_states, squared_norms
from residency.objectives import SFT

EXAMPLES = [
    Example.of(domain="d", row=str(k), prompt=tuple(range(5 + k, 8 + 2 * k)), completion=tuple(range(5, 6 + k)))
    for k in range(6)
]


@pytest.mark.parametrize("size", [1, 8, 30])
def test_importance_of_a_linear_map(size: int) -> None:
    """f = W x gives Ω = E |2 W x xᵀ|, whatever the batches; the mean of gradients would cancel between examples."""
    torch.manual_seed(0)
    features = torch.randn(30, 6, dtype=torch.float64)
    layer = nn.Linear(6, 4, bias=False, dtype=torch.float64)
    model = nn.Sequential(layer)

    def outputs(batch: Batch) -> Tensor:
        return layer(features[batch.input_ids]).flatten(0, 1)[batch.target_at]

    examples = [Example.of(domain="d", row=str(i), prompt=(i,), completion=(0,)) for i in range(30)]
    batches = [make_batch(examples[k : k + size], layout="packed") for k in range(0, 30, size)]
    leaves = {"0.weight": layer.weight}
    found = mean_over_examples(model, leaves, batches, squared_norms(outputs), torch.abs)["0.weight"]
    each = 2 * torch.einsum("ni,nj->nij", layer(features).detach(), features)
    torch.testing.assert_close(found.double(), each.abs().mean(0), rtol=1e-5, atol=0)
    assert float(found.norm()) > 1.2 * float(each.mean(0).abs().norm())


def test_norms_are_means_over_positions() -> None:
    batch = make_batch(EXAMPLES[:3], layout="packed")
    norms = squared_norms(lambda batch: torch.ones(len(batch.targets), 5))(batch)
    assert norms.tolist() == [5.0, 5.0, 5.0], "one, two and three supervised tokens weigh the same"


def build(folder: Path, layout: Layout = "packed", adapter: Any = None, **mitigations: MAS) -> ContinualModule:
    adapter = adapter or lora(target_modules="all-linear", r=2)
    parts = {"backbone": CausalLM(path=str(folder)), "adapter": adapter, "objective": SFT()}
    module = ContinualModule(**parts, mitigations=dict(mitigations), layout=layout)
    module.build(seed=0)
    move(module, 1)
    return module


def move(module: ContinualModule, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in module.adapter.trainable(module.model).values():
            leaf += 0.05 * torch.randn(leaf.shape, generator=draw)


def finish(module: ContinualModule, index: int = 0) -> None:
    stage = Stage(index=index, domain="d", stages=3, seed=0, steps=1, batch_size=6)
    module.begin_stage(stage, EXAMPLES)
    for mitigation in module.mitigations.values():
        mitigation.on_domain_end(module, stage)


def test_hidden_states_are_those_before_the_last_norm(llama: Path) -> None:
    """In every layout; behind the norm all of them would have the same length."""
    module = build(llama, "padded")
    found = {
        layout: hidden_states(module.model, module.forward, make_batch(EXAMPLES, layout=layout))
        for layout in ("packed", "padded")
    }
    torch.testing.assert_close(found["packed"], found["padded"], rtol=1e-4, atol=1e-5)
    batch = make_batch(EXAMPLES, layout="packed")
    norm = module.model.get_base_model().model.norm
    head = module.model.get_base_model().lm_head
    torch.testing.assert_close(head(norm(found["packed"])), module.forward(batch), rtol=1e-4, atol=1e-5)
    lengths = [t.norm(dim=-1) for t in (found["packed"], norm(found["packed"]))]
    spread = [float((t.std() / t.mean()).detach()) for t in lengths]
    assert spread[0] > 0.01 > 0.001 > spread[1]


@pytest.mark.parametrize("output", ["hidden", "log_probabilities"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_importance_does_not_depend_on_batches(output: Any, layout: Layout, llama: Path) -> None:
    sizes = {"one": 1, "all": 10_000}
    module = build(llama, layout, **{name: MAS(output=output, batch_tokens=n) for name, n in sizes.items()})
    finish(module)
    one, every = (module.mitigations[name].state["precision"] for name in sizes)
    assert isinstance(one, dict)
    assert isinstance(every, dict)
    for name, tensor in one.items():
        assert float((tensor - every[name]).norm()) <= 1e-4 * float(tensor.norm()), name
        assert bool((tensor >= 0).all())
    assert all(leaf.grad is None for leaf in module.adapter.trainable(module.model).values())


def test_importance_of_a_language_model(llama: Path) -> None:
    """E |∂ ‖h‖² / ∂θ|, one example at a time, with h the input of the last norm."""
    module = build(llama, mas=MAS(batch_tokens=10_000))
    finish(module)
    found = module.mitigations["mas"].state["precision"]
    assert isinstance(found, dict)
    leaves = module.adapter.trainable(module.model)
    wanted = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    seen: list[Tensor] = []
    norm = module.model.get_base_model().model.norm
    hook = norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for e in EXAMPLES:
        module.model(input_ids=torch.tensor([[*e.prompt, *e.completion]]))
        h = seen.pop()[0, len(e.prompt) - 1 : -1]
        gradients = torch.autograd.grad(h.square().sum(-1).mean(), list(leaves.values()))
        for name, g in zip(leaves, gradients, strict=True):
            wanted[name] += g.abs() / len(EXAMPLES)
    hook.remove()
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).norm()) <= 1e-4 * float(tensor.norm()), name


def test_shifting_all_logits_changes_nothing(llama: Path) -> None:
    """Which is why raw logits are not offered."""
    module = build(llama, "packed", plain=MAS(output="log_probabilities"))
    batch = make_batch(EXAMPLES, layout="packed")
    logits = module.forward(batch).detach()
    norms = [squared_norms(lambda b, c=c: (logits + c).log_softmax(-1))(batch) for c in (0.0, 7.0)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=0)
    raw = [squared_norms(lambda b, c=c: logits + c)(batch) for c in (0.0, 7.0)]
    assert not torch.allclose(raw[0], raw[1])


def test_importances_are_summed_and_the_anchor_is_the_latest(llama: Path) -> None:
    module = build(llama, mas=MAS(), off=MAS(strength=0.0))
    mas, off = module.mitigations["mas"], module.mitigations["off"]
    assert mas.loss_terms(module, None, None) == {}
    finish(module)
    first = dict(mas.state["precision"])  # type: ignore[arg-type]
    move(module, 2)
    finish(module, 1)
    total = mas.state["precision"]
    assert isinstance(total, dict)
    assert all(bool((total[name] >= tensor).all()) for name, tensor in first.items())
    assert float(mas.loss_terms(module, None, None)["penalty"]) == 0
    move(module, 3)
    assert float(mas.loss_terms(module, None, None)["penalty"]) > 0
    assert off.loss_terms(module, None, None) == {}
    gradients = {"x": torch.ones(2)}
    assert off.transform_gradients(module, gradients) is gradients


def test_penalty_has_no_half() -> None:
    """λ Σ Ω (θ - θ*)², with gradient 2 λ Ω (θ - θ*)."""
    mas, theta = MAS(strength=3.0), torch.tensor([1.0, 2.0])
    mas.state.update(precision={"w": torch.tensor([1.0, 4.0])}, anchor={"w": torch.tensor([0.0, 1.0])})
    module: Any = SimpleNamespace(adapter=SimpleNamespace(trainable=lambda model: {"w": theta}), model=None)
    assert float(mas.loss_terms(module, None, None)["penalty"]) == 3 * (1 + 4)
    pulled = mas.transform_gradients(module, {"w": torch.zeros(2)})["w"]
    assert pulled.tolist() == [6.0, 24.0]


def test_full_fine_tuning_is_measured_too(llama: Path) -> None:
    module = build(llama, adapter=Full(), mas=MAS(samples=2))
    finish(module)
    found = module.mitigations["mas"].state["precision"]
    assert isinstance(found, dict)
    # What comes after the hidden state is no part of it.
    still = {name for name, tensor in found.items() if not tensor.any()}
    assert still == {"model.norm.weight"}


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"samples": 0}], ids=str)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        MAS(**options)
