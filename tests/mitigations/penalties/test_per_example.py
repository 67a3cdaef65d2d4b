"""Gradients of single examples: one pass over a batch gives what autograd gives one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from residency.adapters import Adapter, Full
from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.batching import make_batch
from residency.core.types import Batch, Example, Layout
from residency.mitigations.penalties.per_example import ExampleLosses, per_example_gradients, supports_batched

LAYOUTS: list[Layout] = ["packed", "padded"]
EXAMPLES = [
    Example.of(domain="d", row=str(k), prompt=tuple(range(1 + k, 5 + 2 * k)), completion=tuple(range(9, 10 + k)))
    for k in range(4)
]


class Subject:
    """A tiny model in float64 with an adapter whose leaves are all away from zero."""

    def __init__(self, folder: Path, adapter: Adapter) -> None:
        self.backbone = CausalLM(path=str(folder))
        self.model = adapter.attach(self.backbone.load()).double()
        self.leaves = adapter.trainable(self.model)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for leaf in self.leaves.values():
                leaf += 0.05 * torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype)

    def losses(self, batch: Batch) -> Tensor:
        nll = F.cross_entropy(self.backbone.logits(self.model, batch), batch.targets, reduction="none")
        return nll.new_zeros(batch.size).index_add(0, batch.target_example, nll)

    def one_by_one(self) -> dict[str, Tensor]:
        """Stacked gradients of plain forward passes over one sequence each."""
        found = []
        for example in EXAMPLES:
            logits = self.model(input_ids=torch.tensor([[*example.prompt, *example.completion]])).logits[0]
            start = len(example.prompt) - 1
            loss = F.cross_entropy(logits[start:-1], torch.tensor(example.completion), reduction="sum")
            found.append(torch.autograd.grad(loss, list(self.leaves.values())))
        return dict(zip(self.leaves, map(torch.stack, zip(*found, strict=True)), strict=True))

    def supports(self, layout: Layout) -> bool:
        return supports_batched(self.model, self.leaves, make_batch(EXAMPLES, layout=layout), self.losses)

    def gradients(self, layout: Layout, *, batched: bool) -> dict[str, Tensor]:
        return collect(self.model, self.leaves, make_batch(EXAMPLES, layout=layout), self.losses, batched=batched)


def collect(
    model: nn.Module, leaves: dict[str, Tensor], batch: Batch, losses: ExampleLosses, *, batched: bool
) -> dict[str, Tensor]:
    """The parts of every name joined: (B, *shape)."""
    parts: dict[str, list[Tensor]] = {name: [] for name in leaves}
    for name, gradient in per_example_gradients(model, leaves, batch, losses, batched=batched):
        parts[name].append(gradient)
    return {name: torch.cat(found) for name, found in parts.items()}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal to 1e-10 of the norm, tensor by tensor and example by example."""
    assert {*found} == {*wanted}
    for name, expected in wanted.items():
        assert found[name].shape == expected.shape, name
        for mine, theirs in zip(found[name], expected, strict=True):
            assert float((mine - theirs).norm()) <= 1e-10 * float(theirs.norm()), name


ADAPTERS: dict[str, tuple[str, Callable[[], Adapter]]] = {
    "llama-lora": ("llama", lambda: lora(target_modules="all-linear", r=4)),
    "llama-rslora": ("llama", lambda: lora(target_modules=["q_proj"], r=4, use_rslora=True)),
    "gpt2-lora": ("gpt2", lambda: lora(target_modules="all-linear", r=4, fan_in_fan_out=True)),
    "gpt2-lora-bias": ("gpt2", lambda: lora(target_modules="all-linear", r=4, fan_in_fan_out=True, lora_bias=True)),
    "llama-dora": ("llama", lambda: lora(target_modules="all-linear", r=4, use_dora=True)),
    "llama-full": ("llama", Full),
    "gpt2-full": ("gpt2", Full),
}
BATCHED = ["llama-lora", "llama-rslora", "gpt2-lora", "gpt2-lora-bias"]
LOOPED = ["llama-dora", "llama-full", "gpt2-full"]


@pytest.fixture(scope="session")
def subjects(request: pytest.FixtureRequest) -> Callable[[str], Subject]:
    """Subjects by name, each made once."""
    made: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in made:
            folder, make = ADAPTERS[name]
            made[name] = Subject(request.getfixturevalue(folder), make())
        return made[name]

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BATCHED)
def test_one_pass_equals_one_by_one(name: str, layout: Layout, subjects: Callable[[str], Subject]) -> None:
    subject = subjects(name)
    assert subject.supports(layout)
    assert_close(subject.gradients(layout, batched=True), subject.one_by_one())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama-lora", *LOOPED])
def test_the_loop_equals_one_by_one(name: str, layout: Layout, subjects: Callable[[str], Subject]) -> None:
    subject = subjects(name)
    assert_close(subject.gradients(layout, batched=False), subject.one_by_one())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOOPED)
def test_one_pass_is_declined_where_it_would_be_wrong(
    name: str, layout: Layout, subjects: Callable[[str], Subject]
) -> None:
    """Tied embeddings, norms, transposed layers and DoRA's magnitudes have no gradient of the form dy x."""
    assert not subjects(name).supports(layout)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
def test_an_adapted_head(llama: Path) -> None:
    """The head runs at the supervised positions only: in a packed row nobody can cut its input into examples."""
    subject = Subject(llama, lora(target_modules=["q_proj", "lm_head"], r=4))
    assert not subject.supports("packed")
    assert subject.supports("padded")
    wanted = subject.one_by_one()
    assert_close(subject.gradients("packed", batched=False), wanted)
    assert_close(subject.gradients("padded", batched=True), wanted)


# --- nothing is left behind -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-lora", "llama-full"])
def test_the_users_gradients_and_hooks_are_untouched(name: str, subjects: Callable[[str], Subject]) -> None:
    subject = subjects(name)
    kept = dict(list(subject.leaves.items())[::2])
    for leaf in kept.values():
        leaf.grad = torch.full_like(leaf, 7.0)
    grads = {name: leaf.grad for name, leaf in subject.leaves.items()}
    for layout in LAYOUTS:
        batched = subject.supports(layout)
        subject.gradients(layout, batched=batched)
    for leaf_name, leaf in subject.leaves.items():
        assert leaf.grad is grads[leaf_name]
        assert leaf.grad is None or bool((leaf.grad == 7.0).all())
        leaf.grad = None
    assert not any(module._forward_hooks for module in subject.model.modules())


# --- layers that only look linear -------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A linear model of token features, with ways to use its layer that a hook on the layer does not see."""

    def __init__(self, use: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.features = torch.randn(32, 6, dtype=torch.float64)
        self.layer = nn.Linear(6, 6, dtype=torch.float64)
        self.unused = nn.Linear(2, 3, dtype=torch.float64)

    def forward(self, batch: Batch) -> Tensor:
        x = self.features[batch.input_ids]
        y = self.layer(x.flatten(0, 1)).view_as(x) if self.use == "flat" else self.layer(x)
        y = y.tanh()
        if self.use == "twice":
            y = self.layer(y)
        if self.use == "outside":
            y = y @ self.layer.weight
        return y

    def losses(self, batch: Batch) -> Tensor:
        y = self.forward(batch).flatten(0, 1)[batch.target_at].square().sum(-1)
        return y.new_zeros(batch.size).index_add(0, batch.target_example, y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("use", "supported"), [("once", True), ("twice", False), ("outside", False), ("flat", False)])
def test_a_layer_is_judged_by_its_gradients(use: str, supported: bool, layout: Layout) -> None:
    toy = Toy(use)
    leaves: dict[str, Any] = dict(toy.layer.named_parameters(prefix="layer"))
    batch = make_batch(EXAMPLES, layout=layout)
    assert supports_batched(toy, leaves, batch, toy.losses) is supported
    assert not toy.layer._forward_hooks
    singles = [make_batch([e], layout=layout) for e in EXAMPLES]
    rows = [torch.autograd.grad(toy.losses(single).sum(), list(leaves.values())) for single in singles]
    wanted = dict(zip(leaves, map(torch.stack, zip(*rows, strict=True)), strict=True))
    assert_close(collect(toy, leaves, batch, toy.losses, batched=supported), wanted)


@pytest.mark.parametrize("use", ["twice", "flat"])
def test_a_batch_that_cannot_be_cut_is_taken_example_by_example(use: str) -> None:
    """Although the few examples of the trial could: an expert may get all of their tokens."""
    toy = Toy(use)
    leaves: dict[str, Any] = dict(toy.layer.named_parameters(prefix="layer"))
    batch = make_batch(EXAMPLES, layout="packed")
    wanted = collect(toy, leaves, batch, toy.losses, batched=False)
    assert_close(collect(toy, leaves, batch, toy.losses, batched=True), wanted)


def test_a_few_examples_are_tried() -> None:
    """Trying all of a batch would take twice as long as using it."""
    toy = Toy("once")
    sizes: list[int] = []

    def losses(batch: Batch) -> Tensor:
        sizes.append(batch.size)
        return toy.losses(batch)

    batch = make_batch([*EXAMPLES, *EXAMPLES, *EXAMPLES], layout="packed")
    assert supports_batched(toy, dict(toy.layer.named_parameters(prefix="layer")), batch, losses)
    assert sum(sizes) < batch.size


@pytest.mark.parametrize("batched", [True, False])
def test_a_leaf_without_a_part_in_the_loss_has_gradient_zero(batched: bool) -> None:
    toy = Toy("once")
    leaves: dict[str, Any] = dict(toy.named_parameters())
    found = collect(toy, leaves, make_batch(EXAMPLES, layout="packed"), toy.losses, batched=batched)
    assert found["unused.weight"].shape == (4, 3, 2)
    assert not found["unused.weight"].any()
    assert found["layer.weight"].any()
