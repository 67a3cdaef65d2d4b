"""On-policy distillation: what is compared with what, on which tokens, and who gets a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from residency.adapters import Full
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.tensors import snapshot
from residency.core.types import Example, Outputs, Stage
from residency.engine.module import ContinualModule
from residency.mitigations import OnPolicyDistillation
from residency.mitigations.distillation.divergences import buckets, generalised_jsd
from residency.testing.tiny_runs import make_module
from support.stop_and_resume import goes_on_exactly
from table import ADAPTERS

END = 0
EXAMPLES = [
    Example.of(domain="x", row=str(i), prompt=tuple(range(65 + i, 69 + 2 * i)), completion=(40 + i, 50 + i, 60, END))
    for i in range(4)
]
BATCH = len(EXAMPLES)


def build(backbone: Path, name: str = "lora", *, moved: float = 0.1, **options: Any) -> ContinualModule:
    """A module whose weights are away from the pretrained ones, at the start of a stage."""
    mitigation = OnPolicyDistillation(**{"max_new_tokens": 6, **options})
    module = make_module(backbone, ADAPTERS[name].make(), {"own": mitigation})
    module.build(seed=0)
    move(module, 1, moved)
    module.begin_stage(Stage(index=0, domain="x", stages=2, seed=0, steps=2, batch_size=BATCH), EXAMPLES * 2)
    module.model.train()
    mitigation.on_domain_start(module, module.stage)
    return module


def move(module: ContinualModule, seed: int, size: float = 0.1) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in module.adapter.trainable(module.model).values():
            leaf += size * torch.randn(leaf.shape, generator=draw)


def terms(module: ContinualModule, examples: Sequence[Example] = EXAMPLES) -> dict[str, Tensor]:
    batch = make_batch(examples, layout=module.layout)
    outputs = Outputs(loss=module.forward(batch).square().mean(), logits=None, log={})
    return dict(module.mitigations["own"].loss_terms(module, batch, outputs))


def gradients(module: ContinualModule, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.adapter.trainable(module.model).values())))


def write(
    module: ContinualModule, monkeypatch: pytest.MonkeyPatch, answers: Sequence[Sequence[int]]
) -> list[list[tuple[int, ...]]]:
    """Let the student write given answers; what it was asked, call by call."""
    asked: list[list[tuple[int, ...]]] = []

    def generate(model: Any, prompts: Sequence[tuple[int, ...]], **options: Any) -> list[list[int]]:
        assert not model.training
        assert {*options} == {"max_new_tokens", "sampling"}
        asked.append(list(prompts))
        return [list(answers[i % len(answers)]) for i in range(len(prompts))]

    monkeypatch.setattr(module.backbone, "generate", generate)
    return asked


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("teacher", ["live", "ema", "base"])
def test_without_a_demonstration_an_equal_teacher_pulls_nowhere(teacher: Any, alpha: float, llama: Path) -> None:
    """d = "" and teacher = student: loss and gradient are 0."""
    moved = 0.0 if teacher == "base" else 0.1
    module = build(llama, teacher=teacher, alpha=alpha, template="{prompt}", fraction=1.0, moved=moved)
    loss = terms(module)["distillation"]
    assert abs(float(loss.detach())) < 1e-6
    assert max(float(g.abs().max()) for g in gradients(module, loss)) < 1e-6
    shown = build(llama, teacher=teacher, alpha=alpha, fraction=1.0, moved=moved)
    assert float(terms(shown)["distillation"].detach()) > 1e-5, "a demonstration makes the teacher another one"


@pytest.mark.parametrize("teacher", ["live", "ema", "base"])
def test_loss_and_gradient_written_out(teacher: Any, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher reads demonstration and question, the student the question; both are compared at the answer's tokens,
    which are constants, as the teacher is."""
    alpha, answers = 0.3, [[70, 71, 72], [80] * 6]
    module = build(
        llama, teacher=teacher, alpha=alpha, top_k=None, fraction=0.5, strength=0.7, template="a{reference}b{prompt}"
    )
    asked = write(module, monkeypatch, answers)
    start = snapshot(module.adapter.trainable(module.model))
    if teacher != "live":
        move(module, 2)
    loss = terms(module)["distillation"]
    chosen = [next(e for e in EXAMPLES if e.prompt == prompt) for prompt in asked[0]]
    assert len(chosen) == 2
    a, b = (module.backbone.tokenizer(text).input_ids for text in "ab")
    # The first answer came to an end, the second was cut off.
    ends = [(*answers[0], END), tuple(answers[1])]
    plain = [
        Example.of(domain="x", row=e.row, prompt=e.prompt, completion=y) for e, y in zip(chosen, ends, strict=True)
    ]
    shown = [
        Example.of(domain="x", row=e.row, prompt=(*a, *e.completion[:-1], *b, *e.prompt), completion=y)
        for e, y in zip(chosen, ends, strict=True)
    ]
    teacher_batch = make_batch(shown, layout=module.layout)
    with torch.no_grad():
        if teacher == "base":
            said = module.reference_forward(teacher_batch)
        else:
            other = build(llama, moved=0.1)
            other.adapter.load_state(other.model, start)
            said = other.forward(teacher_batch)
    heard = module.forward(make_batch(plain, layout=module.layout))
    wanted = 0.7 * generalised_jsd(buckets(said, None), buckets(heard, None), alpha=alpha).mean()
    torch.testing.assert_close(loss, wanted)
    for found, expected in zip(gradients(module, loss), gradients(module, wanted), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    assert all(p.grad is None for p in module.model.parameters())
    numbers = module.mitigations["own"].metrics_to_log(module)
    assert numbers == {"divergence": pytest.approx(float(loss.detach()) / 0.7), "tokens": 5.0, "kept": 1.0}


def test_all_tokens_kept_is_the_whole_divergence(llama: Path) -> None:
    found = {}
    for top_k in (None, 257, 1000, 4):
        module = build(llama, top_k=top_k, fraction=1.0)
        loss = terms(module)["distillation"]
        found[top_k] = (float(loss.detach()), gradients(module, loss), module.mitigations["own"].metrics_to_log(module))
    for same in (257, 1000):
        assert found[same][0] == pytest.approx(found[None][0], rel=1e-4)
        for one, other in zip(found[same][1], found[None][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)
        assert found[same][2]["kept"] == 1.0
    assert found[4][0] < found[None][0], "a bucket for the rest can only hide a difference"
    assert 0 < found[4][2]["kept"] < 1


def test_answers_are_sampled_from_their_own_seed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The global generator is not touched; another step, another draw and other rows."""
    module = build(llama, fraction=0.5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = float(terms(module)["distillation"].detach())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert float(terms(module)["distillation"].detach()) == first
    asked = write(module, monkeypatch, [[70]])
    at = {"step": 0}
    monkeypatch.setattr(ContinualModule, "global_step", property(lambda self: at["step"]))
    for at["step"] in range(1, 13):  # the answers of a step are written once
        terms(module, EXAMPLES)
        terms(module, EXAMPLES[::-1])
    assert all({*asked[i]} == {*asked[i + 1]} for i in range(0, 24, 2)), "the order in a batch does not matter"
    assert all(len(prompts) == 2 for prompts in asked)
    assert len({frozenset(prompts) for prompts in asked}) > 2
    assert {p for prompts in asked for p in prompts} == {e.prompt for e in EXAMPLES}


def test_the_average_follows_once_per_step(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = {"step": 0}
    monkeypatch.setattr(ContinualModule, "global_step", property(lambda self: at["step"]))
    module = build(llama, teacher="ema", ema_rate=0.25)
    wanted = snapshot(module.adapter.trainable(module.model))
    for at["step"] in (1, 2):
        move(module, at["step"])
        leaves = module.adapter.trainable(module.model)
        wanted = {n: 0.75 * wanted[n] + 0.25 * leaf.detach() for n, leaf in leaves.items()}
        for _ in range(2):
            terms(module)
        kept = module.mitigations["own"].state["teacher"]
        assert isinstance(kept, dict)
        for n, value in wanted.items():
            torch.testing.assert_close(kept[n], value, rtol=1e-5, atol=1e-6)
    module.mitigations["own"].on_domain_end(module, module.stage)
    assert module.mitigations["own"].state_bytes() == 8


def test_the_tasks_own_loss_can_be_taken_away(llama: Path) -> None:
    module = build(llama, task_weight=0.25)
    batch = make_batch(EXAMPLES, layout=module.layout)
    loss = module.forward(batch).square().mean()
    found = module.mitigations["own"].loss_terms(module, batch, Outputs(loss=loss, logits=None, log={}))
    torch.testing.assert_close(loss + found["task"], 0.25 * loss)
    assert {*terms(build(llama))} == {"distillation"}


def test_a_stopped_run_goes_on_bit_for_bit(llama: Path, tmp_path: Path) -> None:
    lines = goes_on_exactly(
        tmp_path,
        llama,
        ADAPTERS["lora"].make,
        lambda: {"own": OnPolicyDistillation(strength=3.0, ema_rate=0.3, task_weight=0.5)},
        data={"micro_batch_size": 2},
    )
    assert all(line["loss/own/distillation"] > 0 for line in lines)
    assert {"own/divergence", "own/tokens", "own/kept"} <= {*lines[-1]}


@pytest.mark.parametrize(
    "options",
    [
        {"strength": -1.0},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"task_weight": 2.0},
        {"alpha": -0.1},
        {"ema_rate": 0.0},
        {"top_k": 0},
        {"max_new_tokens": 0},
        {"temperature": 0.0},
        {"template": "{reference}"},
    ],
)
def test_bad_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="OnPolicyDistillation with"):
        OnPolicyDistillation(**options)


def test_requirements_and_strength_zero(llama: Path) -> None:
    with pytest.raises(UserError, match=r"needs reference(.|\n)*teacher: ema or live"):
        make_module(llama, Full(), {"own": OnPolicyDistillation(teacher="base")})
    assert not OnPolicyDistillation(strength=0.0).touches_training(1)
    assert OnPolicyDistillation().touches_training(0)
    module = build(llama, strength=0.0, task_weight=0.0)
    assert terms(module) == {}
    assert module.mitigations["own"].state_bytes() == 8
