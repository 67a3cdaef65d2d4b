"""EWC against closed forms: the penalty, the Fisher information, and what remains after several domains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from residency.adapters import Adapter, Full
from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.batching import make_batch
from residency.errors import UserError
from residency.mitigations import EWC
from residency.mitigations.fisher import fisher_diagonal
from residency.mitigations.quadratic import add_quadratics, quadratic_penalty
from residency.module import ContinualModule
from residency.objectives import SFT
from residency.randomness import permutation
from residency.storage import load_tree, save_tree
from residency.types import Batch, Example, Layout, Stage

Named = dict[str, Tensor]
SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 4), "b": (5,), "c": ()}


def random_tensors(seed: int, *, dtype: torch.dtype = torch.float64) -> Named:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw, dtype=dtype) for name, shape in SHAPES.items()}


def random_precision(seed: int) -> Named:
    """Not negative, and 0 in places."""
    return {name: t.clamp_min(0) for name, t in random_tensors(seed).items()}


def square(precision: Named, parameters: Named, anchor: Named) -> Tensor:
    """Σ P (θ - θ*)², written out."""
    return torch.stack([(precision[n] * (parameters[n] - anchor[n]) ** 2).sum() for n in precision]).sum()


# --- the penalty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 3000.0])
def test_penalty_and_its_gradient(strength: float) -> None:
    """λ/2 Σ F (θ - θ*)² with gradient λ F (θ - θ*), also behind a factor; checked against finite differences too."""
    theta, anchor, precision = random_tensors(0), random_tensors(1), random_precision(2)
    for leaf in theta.values():
        leaf.requires_grad_()
    penalty = quadratic_penalty(theta, anchor, precision, strength=strength)
    torch.testing.assert_close(penalty, strength / 2 * square(precision, theta, anchor), rtol=1e-12, atol=0)
    (3 * penalty).backward()
    for name, leaf in theta.items():
        wanted = 3 * strength * precision[name] * (leaf - anchor[name])
        torch.testing.assert_close(leaf.grad, wanted.detach(), rtol=1e-12, atol=0)

    def of(*values: Tensor) -> Tensor:
        return quadratic_penalty(dict(zip(theta, values, strict=True)), anchor, precision, strength=1.0)

    assert torch.autograd.gradcheck(of, tuple(theta.values()))


def test_no_penalty_at_the_anchor() -> None:
    theta = {name: t.requires_grad_() for name, t in random_tensors(0).items()}
    anchor = {name: t.detach().clone() for name, t in theta.items()}
    penalty = quadratic_penalty(theta, anchor, random_precision(1), strength=1e6)
    penalty.backward()
    assert penalty.detach() == 0
    assert not any(leaf.grad.any() for leaf in theta.values() if leaf.grad is not None)


def test_weights_in_half_precision_keep_their_type() -> None:
    theta = random_tensors(0, dtype=torch.bfloat16)
    anchor = {name: t + 0.5 for name, t in theta.items()}
    precision = {name: torch.ones(t.shape) for name, t in theta.items()}
    for leaf in theta.values():
        leaf.requires_grad_()
    quadratic_penalty(theta, anchor, precision, strength=2.0).backward()
    for name, leaf in theta.items():
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.bfloat16
        torch.testing.assert_close(leaf.grad, 2 * (leaf - anchor[name]).detach())


def test_groups_do_not_disturb_each_other() -> None:
    """A group whose F is a million times larger leaves the pull on the others as it is: nothing is normalised."""
    theta, anchor, precision = random_tensors(0), random_tensors(1), random_precision(2)
    theta["b"].requires_grad_()
    large = precision | {"a": 1e6 * precision["a"]}
    pulls = [
        torch.autograd.grad(quadratic_penalty(theta, anchor, p, strength=1.0), theta["b"])[0]
        for p in (precision, large)
    ]
    assert torch.equal(*pulls)
    parts = [quadratic_penalty({n: theta[n]}, anchor, large, strength=1.0) for n in theta]
    torch.testing.assert_close(quadratic_penalty(theta, anchor, large, strength=1.0), torch.stack(parts).sum())


def test_unit_precision_is_l2_towards_the_start() -> None:
    theta, start = random_tensors(0), random_tensors(1)
    ones = {name: torch.ones_like(t) for name, t in theta.items()}
    distance = torch.cat([(theta[n] - start[n]).flatten() for n in theta]).norm()
    torch.testing.assert_close(quadratic_penalty(theta, start, ones, strength=0.1), 0.05 * distance**2)


# --- two quadratics (C3) ----------------------------------------------------------------------------------------------


def with_quadratic(strength: float, precision: Tensor, anchor: Tensor) -> Callable[[Tensor], dict[str, Tensor]]:
    """The loss terms of an EWC that remembers one quadratic, as a function of θ."""
    ewc = EWC(strength=strength)
    ewc.state.update(precision={"w": precision}, anchor={"w": anchor})

    def terms(theta: Tensor) -> dict[str, Tensor]:
        module = SimpleNamespace(adapter=SimpleNamespace(trainable=lambda model: {"w": theta}), model=None)
        return dict(ewc.loss_terms(module, None, None))

    return terms


@pytest.mark.parametrize(("strength", "minimiser", "first_loss"), [(1.0, (2 / 3, 1 / 5), 0.302222), (0.0, (1, 1), 2.5)])
def test_two_quadratics_end_at_the_joint_optimum(
    strength: float, minimiser: tuple[float, float], first_loss: float
) -> None:
    """H1 = diag(1, 4) around 0, then H2 = diag(2, 1) around 1: with F = H1 and λ = 1 nothing is forgotten."""
    first, second = (torch.tensor(h, dtype=torch.float64) for h in ((1.0, 4.0), (2.0, 1.0)))
    terms = with_quadratic(strength, first, torch.zeros(2, dtype=torch.float64))
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        loss = 0.5 * (second * (theta - 1) ** 2).sum() + sum(terms(theta).values())
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - 0.2 * gradient).detach().requires_grad_()
    theta = theta.detach()
    torch.testing.assert_close(theta, torch.tensor(minimiser, dtype=torch.float64))
    assert float(0.5 * (first * theta**2).sum()) == pytest.approx(first_loss, abs=1e-6)


# --- the sum of quadratics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domains", [1, 2, 3, 6])
def test_many_quadratics_are_one(domains: int) -> None:
    """Precision, anchor and constant of constant size give Σ_k P_k (θ - θ_k)² at every θ."""
    quadratics = [(random_precision(10 + k), random_tensors(20 + k)) for k in range(domains)]
    precision, anchor = quadratics[0]
    constant = torch.zeros((), dtype=torch.float64)
    for quadratic in quadratics[1:]:
        precision, anchor, constant = add_quadratics((precision, anchor, constant), quadratic)
    for seed in range(5):
        theta = {name: 3 * t for name, t in random_tensors(seed).items()}
        separate = torch.stack([square(p, theta, a) for p, a in quadratics]).sum()
        torch.testing.assert_close(square(precision, theta, anchor) + constant, separate, rtol=1e-12, atol=0)


def test_where_nothing_matters_the_anchor_is_the_latest() -> None:
    zeros = {name: torch.zeros_like(t) for name, t in random_tensors(0).items()}
    first, second = random_tensors(1), random_tensors(2)
    precision, anchor, constant = add_quadratics((zeros, first, torch.zeros(())), (zeros, second))
    assert all(torch.equal(anchor[n], second[n]) for n in second)
    assert not any(t.any() for t in precision.values())
    assert float(constant) == 0


# --- the Fisher information of linear models --------------------------------------------------------------------------


class Readout(nn.Module):
    """A linear layer on a table of features: the prompt is the row, the completion the class or the target."""

    def __init__(self, features: Tensor, classes: int) -> None:
        super().__init__()
        self.features = features
        self.layer = nn.Linear(features.shape[1], classes, bias=False, dtype=features.dtype)

    def outputs(self, batch: Batch) -> Tensor:
        return self.layer(self.features[batch.input_ids]).flatten(0, 1)[batch.target_at]

    def nll(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(batch), batch.targets, reduction="none")

    def fisher(self, pairs: Sequence[tuple[int, int]], losses: Callable[[Batch], Tensor], *, size: int) -> Tensor:
        """Of (prompt, completion) pairs in batches of one size."""
        examples = [Example(domain="d", row=str(i), prompt=(x,), completion=(y,)) for i, (x, y) in enumerate(pairs)]
        batches = [make_batch(examples[i : i + size], layout="packed") for i in range(0, len(examples), size)]
        return fisher_diagonal(self, {"layer.weight": self.layer.weight}, batches, losses)["layer.weight"]


@pytest.mark.parametrize("size", [1, 8, 50])
def test_fisher_of_a_linear_softmax_model(size: int) -> None:
    """(p_c - y_c)² x_j², averaged over examples."""
    torch.manual_seed(0)
    model = Readout(torch.randn(20, 6, dtype=torch.float64), classes=4)
    pairs = [(i % 20, (i * i) % 4) for i in range(50)]
    x = model.features[[row for row, _ in pairs]]
    y = F.one_hot(torch.tensor([label for _, label in pairs]), 4)
    errors = model.layer(x).softmax(-1).detach() - y
    wanted = torch.einsum("nc,nj->cj", errors**2, x**2) / 50
    torch.testing.assert_close(model.fisher(pairs, model.nll, size=size).double(), wanted, rtol=1e-5, atol=0)


def test_fisher_of_logistic_regression() -> None:
    """Labels as frequent as the model says them: the data's Fisher is the model's own, E[p (1 - p) x²]."""
    x = torch.tensor([[2.0, 1.0], [1.0, -3.0], [-1.0, 0.5]], dtype=torch.float64)
    model = Readout(x, classes=2)
    # The difference of the logits is ± ln 3, so one class has p = 1/4 and three labels in four are the other.
    w = torch.linalg.solve(x[:2], torch.tensor([math.log(3), -math.log(3)], dtype=torch.float64))
    with torch.no_grad():
        model.layer.weight.copy_(torch.stack([torch.zeros_like(w), w]))
    pairs = [(0, label) for label in (1, 1, 1, 0)] + [(1, label) for label in (0, 0, 0, 1)]
    wanted = (0.25 * 0.75 * x[:2] ** 2).mean(0)
    for row in model.fisher(pairs, model.nll, size=4).double():
        torch.testing.assert_close(row, wanted, rtol=1e-5, atol=0)


def test_gradients_are_squared_before_they_are_averaged() -> None:
    """C13: where noise dominates, the square of a batch's mean gradient is F / B; ours does not know the batch size."""
    torch.manual_seed(0)
    count, noise = 1024, torch.randn(1024, dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std(correction=0)
    model = Readout(torch.ones(1, 1, dtype=torch.float64), classes=1)
    nn.init.constant_(model.layer.weight, 0.1)

    def losses(batch: Batch) -> Tensor:
        return 0.5 * (model.outputs(batch)[:, 0] - noise[batch.targets]) ** 2

    trap = {b: float((0.1 - noise).view(-1, b).mean(1).square().mean()) for b in (1, 8, 64)}
    assert trap == pytest.approx({1: 1.01, 8: 0.14, 64: 0.026}, rel=0.25)
    for size in trap:
        found = model.fisher([(0, i) for i in range(count)], losses, size=size)
        assert float(found) == pytest.approx(1.01, rel=1e-5)


def test_a_fisher_information_needs_examples() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        fisher_diagonal(nn.Linear(1, 1), {}, [], lambda batch: torch.zeros(0))


# --- in a language model ----------------------------------------------------------------------------------------------

EXAMPLES = {
    domain: [
        Example(
            domain=domain, row=str(k), prompt=tuple(range(a + k, a + 3 + 2 * k)), completion=tuple(range(a, a + 1 + k))
        )
        for k in range(8)
    ]
    for domain, a in (("first", 5), ("second", 60))
}
MADE: dict[str, Callable[[], Adapter]] = {"lora": lambda: lora(target_modules="all-linear", r=2), "full": Full}


def build(folder: Path, adapter: str, layout: Layout = "packed", **mitigations: EWC) -> ContinualModule:
    """A module whose weights are away from where the adapter starts."""
    parts = {"backbone": CausalLM(path=str(folder)), "adapter": MADE[adapter](), "objective": SFT()}
    module = ContinualModule(**parts, mitigations=dict(mitigations), layout=layout)
    module.build(seed=0)
    move(module, 1)
    return module


def move(module: ContinualModule, seed: int) -> None:
    """A step of training, as far as EWC can tell."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in module.adapter.trainable(module.model).values():
            leaf += 0.05 * torch.randn(leaf.shape, generator=draw)


def finish(module: ContinualModule, domain: str, *names: str) -> None:
    """Finish a domain as the stream does; the dataset holds some rows twice and rows of another domain."""
    other = EXAMPLES["second" if domain == "first" else "first"]
    dataset = [*EXAMPLES[domain], *other[:2], *EXAMPLES[domain][:3]]
    stage = Stage(index=0, domain=domain, stages=2, seed=0, steps=1, batch_size=len(dataset))
    module.begin_stage(stage, dataset)
    for name in names or module.mitigations:
        module.mitigations[name].on_domain_end(module, stage)


def penalty(module: ContinualModule, name: str) -> float:
    terms = module.mitigations[name].loss_terms(module, None, None)
    assert {*terms} == {"penalty"}
    return float(terms["penalty"].detach())


def brute_force(module: ContinualModule, examples: Sequence[Example]) -> Named:
    """Mean of squared gradients, one plain forward pass per example."""
    leaves = module.adapter.trainable(module.model)
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for e in examples:
        labels = torch.tensor([[*[-100] * len(e.prompt), *e.completion]])
        loss = module.model(input_ids=torch.tensor([[*e.prompt, *e.completion]]), labels=labels).loss
        gradients = torch.autograd.grad(loss * len(e.completion), list(leaves.values()))
        for name, gradient in zip(leaves, gradients, strict=True):
            total[name] += gradient**2 / len(examples)
    return total


def assert_named_close(found: Any, wanted: Named, *, relative: float) -> None:
    assert {*found} == {*wanted}
    for name, expected in wanted.items():
        assert float((found[name] - expected).norm()) <= relative * float(expected.norm()), name


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("adapter", MADE)
def test_fisher_of_a_language_model(adapter: str, layout: Layout, llama: Path) -> None:
    """Per sequence, over distinct rows of the domain, whatever the batches; nothing of the model is touched."""
    module = build(llama, adapter, layout, one=EWC(batch_tokens=1), eight=EWC(batch_tokens=10_000))
    leaves = module.adapter.trainable(module.model)
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    finish(module, "first")
    one, eight = (module.mitigations[name].state["precision"] for name in ("one", "eight"))
    assert_named_close(one, brute_force(module, EXAMPLES["first"]), relative=1e-4)
    assert_named_close(eight, dict(one), relative=1e-5)
    assert all(bool((t >= 0).all()) for t in eight.values())
    assert all(leaf.grad is None and torch.equal(leaf, before[name]) for name, leaf in leaves.items())


def test_fisher_samples_are_drawn_by_the_seed(llama: Path) -> None:
    module = build(llama, "lora", ewc=EWC(fisher_samples=3))
    finish(module, "first")
    drawn = [EXAMPLES["first"][i] for i in permutation(8, 0, "fisher", 0)[:3]]
    assert_named_close(module.mitigations["ewc"].state["precision"], brute_force(module, drawn), relative=1e-4)


def test_nothing_is_added_before_the_first_domain_ends_nor_at_strength_zero(llama: Path) -> None:
    module = build(llama, "lora", on=EWC(strength=5.0), off=EWC(strength=0.0))
    for name in ("on", "off"):
        assert module.mitigations[name].loss_terms(module, None, None) == {}
    finish(module, "first")
    assert penalty(module, "on") == 0, "the weights have not moved since the domain ended"
    move(module, 2)
    assert penalty(module, "on") > 0
    assert module.mitigations["off"].loss_terms(module, None, None) == {}


def test_separate_is_the_sum_of_one_penalty_per_domain(llama: Path) -> None:
    once = {name: EWC(strength=50.0) for name in ("first", "second", "both")}
    module = build(llama, "lora", **once, double=EWC(strength=100.0))
    finish(module, "first", "first", "both", "double")
    move(module, 2)
    finish(module, "second", "second", "both", "double")
    at_second = penalty(module, "both")
    assert at_second == pytest.approx(penalty(module, "first"), rel=1e-4), "the second quadratic is 0 at its anchor"
    move(module, 3)
    wanted = penalty(module, "first") + penalty(module, "second")
    assert penalty(module, "both") == pytest.approx(wanted, rel=1e-4)
    assert penalty(module, "double") == pytest.approx(2 * wanted, rel=1e-4)
    one, two = (module.mitigations[name].state_bytes() for name in ("first", "both"))
    assert one == two, "memory must not grow with the number of domains"


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_online_decays_the_past_and_anchors_at_the_latest(decay: float, llama: Path) -> None:
    module = build(llama, "lora", first=EWC(), second=EWC(), online=EWC(mode="online", decay=decay))
    finish(module, "first", "first", "online")
    move(module, 2)
    finish(module, "second", "second", "online")
    old, new, found = (module.mitigations[name].state for name in ("first", "second", "online"))
    wanted = {n: decay * old["precision"][n] + t for n, t in new["precision"].items()}
    assert_named_close(found["precision"], wanted, relative=1e-6)
    assert all(torch.equal(found["anchor"][n], t) for n, t in new["anchor"].items())
    assert penalty(module, "online") == 0


def test_state_survives_a_file(llama: Path, tmp_path: Path) -> None:
    module = build(llama, "lora", ewc=EWC(), back=EWC())
    finish(module, "first", "ewc")
    move(module, 2)
    finish(module, "second", "ewc")
    move(module, 3)
    save_tree(tmp_path / "state.safetensors", module.mitigations["ewc"].state_dict())
    module.mitigations["back"].load_state_dict(load_tree(tmp_path / "state.safetensors"))
    assert penalty(module, "back") == penalty(module, "ewc") > 0
    assert module.mitigations["back"].state_bytes() == module.mitigations["ewc"].state_bytes() > 0
    assert module.mitigations["back"].state_key != module.mitigations["ewc"].state_key
    with pytest.raises(KeyError, match="precision"):
        EWC().load_state_dict({"precision": {}})


@pytest.mark.parametrize(
    "options", [{"strength": -1.0}, {"decay": -0.1}, {"decay": 1.1}, {"fisher_samples": 0}], ids=lambda o: next(iter(o))
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        EWC(**options)
