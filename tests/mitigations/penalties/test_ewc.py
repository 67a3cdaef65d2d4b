"""EWC: what remains after several domains, and what reaches the gradients."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from residency.adapters import Adapter, Full
from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.randomness import permutation
from residency.core.tensor_files import load_tree, save_tree
from residency.core.types import Example, Layout, Stage
from residency.engine.module import ContinualModule
from residency.mitigations import EWC
from residency.mitigations.penalties.sampling import unpack_facts
from residency.objectives import SFT
from residency.objectives.sft import token_nll
from residency.testing.tiny_runs import train

Named = dict[str, Tensor]


# --- two quadratics (C3) ----------------------------------------------------------------------------------------------


def with_quadratic(strength: float, precision: Tensor, anchor: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What an EWC that remembers one quadratic makes of a gradient at θ."""
    ewc = EWC(strength=strength)
    ewc.state.update(precision={"w": precision}, anchor={"w": anchor})

    def transform(theta: Tensor, gradient: Tensor) -> Tensor:
        module = SimpleNamespace(adapter=SimpleNamespace(trainable=lambda model: {"w": theta}), model=None)
        return dict(ewc.transform_gradients(module, {"w": gradient}))["w"]

    return transform


@pytest.mark.parametrize(("strength", "minimiser", "first_loss"), [(1.0, (2 / 3, 1 / 5), 0.302222), (0.0, (1, 1), 2.5)])
def test_two_quadratics_end_at_the_joint_optimum(
    strength: float, minimiser: tuple[float, float], first_loss: float
) -> None:
    """H1 = diag(1, 4) around 0, then H2 = diag(2, 1) around 1: with F = H1 and λ = 1 nothing is forgotten."""
    first, second = (torch.tensor(h, dtype=torch.float64) for h in ((1.0, 4.0), (2.0, 1.0)))
    transform = with_quadratic(strength, first, torch.zeros(2, dtype=torch.float64))
    theta = torch.zeros(2, dtype=torch.float64)
    for _ in range(200):
        theta = theta - 0.2 * transform(theta, second * (theta - 1))
    torch.testing.assert_close(theta, torch.tensor(minimiser, dtype=torch.float64))
    assert float(0.5 * (first * theta**2).sum()) == pytest.approx(first_loss, abs=1e-6)


# --- in a language model ----------------------------------------------------------------------------------------------

EXAMPLES = {
    domain: [
        Example.of(
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
    "options",
    [
        {"strength": -1.0},
        {"decay": -0.1},
        {"decay": 1.1},
        {"fisher_samples": 0},
        {"fisher": "true", "granularity": "token"},
    ],
    ids=lambda o: next(iter(o)),
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        EWC(**options)


def test_other_estimates_of_a_language_model(llama: Path) -> None:
    kinds = {
        "data": {},
        "sampled": {"fisher": "sampled"},
        "token": {"granularity": "token"},
        "batch": {"fisher": "batch"},
    }
    module = build(llama, "lora", **{name: EWC(**options) for name, options in kinds.items()})
    finish(module, "first")
    found = {name: module.mitigations[name].state["precision"] for name in kinds}
    norms = {name: float(sum(t.sum() for t in fisher.values())) for name, fisher in found.items()}
    assert len({round(value, 12) for value in norms.values()}) == 4
    assert norms["batch"] < norms["data"]
    single = [
        replace(e, prompt=e.prompt + e.completion[:k]).answered(e.completion[k : k + 1])
        for e in EXAMPLES["first"]
        for k in range(len(e.completion))
    ]
    wanted = {n: t * len(single) / 8 for n, t in brute_force(module, single).items()}
    assert_named_close(found["token"], wanted, relative=1e-4)
    facts = unpack_facts(module.mitigations["token"].state["facts"])
    assert facts == {
        "fisher": "empirical",
        "granularity": "token",
        "reduction": "sum",
        "mode": "separate",
        "examples": 8,
    }


def test_true_fisher_of_a_labelled_domain(llama: Path) -> None:
    """Σ_c p_c (∂ log p_c)² over the labels, by brute force; free text is refused before it is learned."""
    module = build(llama, "lora", ewc=EWC(fisher="true"))
    labels = [(40, 41), (50,)]
    dataset = [e.answered(labels[k % 2]) for k, e in enumerate(EXAMPLES["first"])]
    stage = Stage(index=0, domain="first", stages=2, seed=0, steps=1, batch_size=8)
    module.begin_stage(stage, dataset)
    ewc = module.mitigations["ewc"]
    ewc.on_domain_start(module, stage)
    ewc.on_domain_end(module, stage)
    leaves = module.adapter.trainable(module.model)
    wanted = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for example in dataset:
        batch = make_batch([example.answered(label) for label in labels], layout=module.layout)
        nll = token_nll(module.forward(batch), batch.targets)
        log_p = (-nll.new_zeros(2).index_add(0, batch.target_example, nll)).log_softmax(0)
        for c in range(2):
            gradients = torch.autograd.grad(log_p[c], list(leaves.values()), retain_graph=True)
            for name, g in zip(leaves, gradients, strict=True):
                wanted[name] += log_p[c].exp().detach() * g**2 / len(dataset)
    assert_named_close(ewc.state["precision"], wanted, relative=1e-3)
    module.begin_stage(stage, EXAMPLES["first"])
    with pytest.raises(UserError, match="8 completions"):
        ewc.on_domain_start(module, stage)


@pytest.mark.parametrize("adapter", MADE)
def test_the_pull_is_the_gradient_of_the_logged_penalty(adapter: str, llama: Path) -> None:
    module = build(llama, adapter, ewc=EWC(strength=50.0))
    ewc = module.mitigations["ewc"]
    finish(module, "first")
    move(module, 2)
    leaves = module.adapter.trainable(module.model)
    gradients = {name: torch.ones_like(leaf) for name, leaf in leaves.items()}
    pulled = ewc.transform_gradients(module, gradients)
    slope = sum(float(((pulled[name] - 1) * 1.0).double().square().sum()) for name in leaves)
    before = penalty(module, "ewc")
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf -= 1e-3 / slope**0.5 * (pulled[name] - 1)
    assert before - penalty(module, "ewc") == pytest.approx(1e-3 * slope**0.5, rel=0.02)
    numbers = ewc.metrics_to_log(module)
    assert {*numbers} == {"distance", "pull"}
    assert numbers["pull"] == pytest.approx(slope**0.5, rel=0.05)


class Spy(EWC):
    """Keeps, per optimizer step, the norms of the gradient it was given and of what it added, and its own `pull`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.steps: list[tuple[float, float, float]] = []

    def transform_gradients(self, module: Any, gradients: Any) -> Any:
        """As said."""
        pulled = super().transform_gradients(module, gradients)
        if pulled is not gradients:
            given = torch.cat([g.flatten() for g in gradients.values()]).norm()
            added = torch.cat([(pulled[name] - g).flatten() for name, g in gradients.items()]).norm()
            self.steps.append((float(given), float(added), self.metrics_to_log(module)["pull"]))
        return pulled


def test_the_pull_counts_once_per_step_however_a_batch_is_cut(llama: Path, tmp_path: Path) -> None:
    """With four micro-batches to a step λ F (θ - θ*) is added once; the losses' own gradient has none of it."""
    spy = Spy(strength=1e9)
    options = {"kinds": {"a": "label", "b": "label"}, "data": {"micro_batch_size": 1}}
    train(tmp_path / "run", llama, MADE["lora"](), {"ewc": spy}, **options)
    assert len(spy.steps) == 4, "one for each step of the second stage"
    assert all(given < 100 for given, _, _ in spy.steps)
    assert max(added for _, added, _ in spy.steps) > 1000
    for _, added, pull in spy.steps:
        assert added == pytest.approx(pull, rel=1e-3, abs=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    second = [line for line in lines if line["stage"] == 2]
    assert [line["ewc/pull"] for line in second] == pytest.approx([pull for _, _, pull in spy.steps], rel=1e-4)
    assert all(line["loss"] == pytest.approx(line["loss/task"] + line["loss/ewc/penalty"], rel=1e-4) for line in second)
    assert second[-1]["loss/ewc/penalty"] > 0
