"""Self-distillation: which teacher, when, from where; the cache; resume. The loss itself: test_divergences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from residency.adapters import Full
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.tensors import size_in_bytes, snapshot, swapped
from residency.core.types import Example, Outputs, Stage, supervised_tokens
from residency.engine.module import ContinualModule
from residency.mitigations import SelfDistillation
from residency.mitigations.distillation.divergences import distillation_loss
from residency.mitigations.distillation.teachers import follow, run_as, teacher_logits
from residency.objectives.row_weighted import STM
from residency.objectives.sft import FullText
from residency.testing.tiny_runs import make_module, train
from support.stop_and_resume import goes_on_exactly, history
from table import ADAPTERS
from table import ADAPTERS as ADAPTER_ROWS

EXAMPLES = [
    Example.of(
        domain="x", row=str(i), prompt=tuple(range(5 + i, 9 + 2 * i)), completion=(40 + i, 50 + i, 60, 0)[i % 2 :]
    )
    for i in range(5)
]
TERM = "loss/kd/distillation"


def stage(index: int = 1) -> Stage:
    return Stage(index=index, domain="x", stages=3, seed=0, steps=2, batch_size=4)


def build(
    backbone: Path, mitigation: SelfDistillation, name: str = "lora", index: int = 1, **parts: Any
) -> ContinualModule:
    """A module whose weights are away from the pretrained ones, at the start of a stage."""
    module = make_module(backbone, ADAPTERS[name].make(), {"kd": mitigation}, **parts)
    module.build(seed=0)
    move(module, 1)
    module.begin_stage(stage(index), [EXAMPLES[i % 5] for i in range(8)])
    module.model.train()
    mitigation.on_domain_start(module, module.stage)
    return module


def move(module: ContinualModule, seed: int) -> None:
    """What steps of training do."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in module.adapter.trainable(module.model).values():
            leaf += 0.1 * torch.randn(leaf.shape, generator=draw)


def term(module: ContinualModule, examples: Any = tuple(EXAMPLES)) -> Tensor:
    batch = make_batch(list(examples), layout=module.layout)
    outputs = Outputs(loss=torch.zeros(()), logits=module.forward(batch), log={})
    terms = module.mitigations["kd"].loss_terms(module, batch, outputs)
    assert {*terms} == {"distillation"}
    return terms["distillation"]


def gradients(module: ContinualModule, loss: Tensor) -> dict[str, Tensor]:
    leaves = module.adapter.trainable(module.model)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(leaf) if g is None else g for (n, leaf), g in zip(leaves.items(), found, strict=True)}


# --- the teacher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "full"])
def test_the_previous_teacher_is_the_model_before_the_stage(name: str, llama: Path) -> None:
    """Nothing at the first step; later the divergence from logits that were written down before; one copy of the leaves
    and no more is kept."""
    mitigation = SelfDistillation(strength=0.7)
    module = build(llama, mitigation, name)
    batch = make_batch(EXAMPLES, layout=module.layout)
    with torch.no_grad():
        before = module.forward(batch)
    start = term(module)
    assert float(start.detach()) == 0
    assert not any(g.any() for g in gradients(module, start).values())
    move(module, 2)
    now = snapshot(module.adapter.trainable(module.model))
    torch.testing.assert_close(term(module), 0.7 * distillation_loss(module(batch), before, temperature=2.0))
    leaves = module.adapter.trainable(module.model)
    assert all(torch.equal(leaf, now[n]) for n, leaf in leaves.items())
    assert mitigation.state_bytes() == size_in_bytes(now) + 8
    mitigation.on_domain_end(module, module.stage)
    assert mitigation.state_bytes() == 8, "the next stage has another teacher"


def test_the_base_teacher_is_the_pretrained_model(llama: Path) -> None:
    mitigation = SelfDistillation(teacher="base")
    module = build(llama, mitigation, index=0)
    batch = make_batch(EXAMPLES, layout=module.layout)
    pristine = make_module(llama, Full(), {})
    pristine.build(seed=0)
    with torch.no_grad():
        wanted = pristine.forward(replace(batch))
    assert torch.equal(teacher_logits(module, batch, None), wanted)
    torch.testing.assert_close(term(module), distillation_loss(module(batch), wanted, temperature=2.0))
    assert mitigation.state_bytes() == 8
    assert mitigation.first_domain == 0
    assert SelfDistillation().first_domain == 1
    assert SelfDistillation().requires == frozenset()


def test_a_base_teacher_needs_a_reference(llama: Path) -> None:
    with pytest.raises(UserError, match=r"needs reference(.|\n)*previous model"):
        make_module(llama, Full(), {"kd": SelfDistillation(teacher="base")})


def test_the_average_follows_once_per_step(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(1 - rate) θ̄ + rate θ after every optimizer step, not after every micro-batch."""
    at = {"step": 0}
    monkeypatch.setattr(ContinualModule, "global_step", property(lambda self: at["step"]))
    mitigation = SelfDistillation(teacher="ema", ema_rate=0.25)
    module = build(llama, mitigation)
    wanted = snapshot(module.adapter.trainable(module.model))
    for step in (1, 2, 3):
        move(module, step)
        at["step"] = step
        leaves = module.adapter.trainable(module.model)
        wanted = {n: 0.75 * wanted[n] + 0.25 * leaf.detach() for n, leaf in leaves.items()}
        for _ in range(2):
            term(module)
            kept = mitigation.state["teacher"]
            assert isinstance(kept, dict)
            for n, value in wanted.items():
                torch.testing.assert_close(kept[n], value, rtol=1e-5, atol=1e-6)
    start = {"w": torch.ones(2)}
    assert torch.equal(follow(start, {"w": torch.zeros(2)}, rate=1.0)["w"], torch.zeros(2))
    assert torch.equal(start["w"], torch.ones(2))


@pytest.mark.parametrize("options", [{}, {"teacher": "base"}, {"cache": 8}])
def test_no_gradient_reaches_the_teacher(options: dict[str, Any], llama: Path) -> None:
    """The gradient is that of a constant teacher, and nothing is left in `.grad`."""
    module = build(llama, SelfDistillation(**options))
    batch = make_batch(EXAMPLES, layout=module.layout)
    constant = teacher_logits(module, batch, None if options else {})
    move(module, 2)
    found = gradients(module, term(module))
    assert all(p.grad is None for p in module.model.parameters())
    if "cache" not in options:
        wanted = gradients(module, distillation_loss(module(batch), constant, temperature=2.0))
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7)


def test_swapping_leaves_in_the_middle_of_a_graph_changes_no_gradient(llama: Path) -> None:
    module = build(llama, SelfDistillation(), "full")
    batch = make_batch(EXAMPLES, layout=module.layout)
    leaves = module.adapter.trainable(module.model)
    other = {name: torch.randn_like(leaf) for name, leaf in leaves.items()}
    wanted = gradients(module, module(batch).square().mean())
    loss = module(batch).square().mean()
    with torch.no_grad(), swapped(leaves, other):
        assert not torch.equal(module(batch).square().mean(), loss)
    found = gradients(module, loss)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
    with pytest.raises(RuntimeError, match="inside"), swapped(leaves, other):
        raise RuntimeError("inside")
    assert torch.equal(module(batch).square().mean(), loss)


def test_the_teacher_has_no_dropout_and_draws_nothing(llama_dropout: Path) -> None:
    module = build(llama_dropout, SelfDistillation(), "lora_dropout")
    batch = make_batch(EXAMPLES, layout=module.layout)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (teacher_logits(module, batch, {}) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert module.model.training
    with pytest.raises(ZeroDivisionError):
        run_as(module, {}, lambda: 1 / 0)
    assert module.model.training


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["previous", "base"])
def test_a_cache_of_everything_is_the_second_forward_pass(teacher: Any, llama: Path) -> None:
    """In any order of rows, and whatever the passes of the cache were; up to rounding, because batches differ."""
    exact = build(llama, SelfDistillation(teacher=teacher))
    for tokens in (12, 1000):
        cached = build(llama, SelfDistillation(teacher=teacher, cache=257, batch_tokens=tokens))
        for module in (exact, cached):
            module.adapter.load_state(module.model, exact.adapter.state(exact.model))
        for module in (exact, cached):
            move(module, 5)
        for examples in (EXAMPLES, EXAMPLES[::-1], [EXAMPLES[2], EXAMPLES[2]]):
            whole, kept = term(exact, examples), term(cached, examples)
            torch.testing.assert_close(kept, whole, rtol=1e-4, atol=1e-6)
            left, right = gradients(exact, whole), gradients(cached, kept)
            for name in left:
                torch.testing.assert_close(right[name], left[name], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("objective", [FullText(), STM(threshold=300.0)], ids=["full text", "masked tokens"])
def test_a_cache_follows_what_the_objective_makes_of_the_rows(objective: Any, llama: Path) -> None:
    """Prompts that are learnt, tokens that are left out: each target meets what the teacher said about it."""
    exact, cached = (build(llama, SelfDistillation(cache=cache), objective=objective) for cache in (None, 257))
    cached.adapter.load_state(cached.model, exact.adapter.state(exact.model))
    rows = [exact.dataset[i] for i in range(len(EXAMPLES))]
    assert sum(map(supervised_tokens, rows)) != sum(map(supervised_tokens, EXAMPLES)), "the objective changed nothing"
    assert [cached.dataset[i] for i in range(len(EXAMPLES))] == rows
    for module in (exact, cached):
        move(module, 5)
    torch.testing.assert_close(term(cached, rows), term(exact, rows), rtol=1e-4, atol=1e-6)


def test_a_small_cache_says_what_it_keeps(llama: Path) -> None:
    mitigation = SelfDistillation(cache=3)
    module = build(llama, mitigation)
    batch = make_batch(EXAMPLES, layout=module.layout)
    mass = (teacher_logits(module, batch, {}) / 2).softmax(-1).topk(3).values.sum(-1).mean()
    move(module, 2)
    loss = float(term(module).detach())
    numbers = mitigation.metrics_to_log(module)
    assert {*numbers} == {"kl", "kept"}
    assert numbers["kept"] == pytest.approx(float(mass), rel=1e-4)
    assert numbers["kl"] == pytest.approx(loss / 4)
    tokens = sum(len(e.completion) for e in EXAMPLES)
    assert mitigation.state_bytes() == 8 + tokens * 3 * 8 + 5 * 24, "no copy of the leaves beside the cache"
    with pytest.raises(UserError, match=r"not in the cache(.|\n)*kd.cache to null"):
        term(module, [EXAMPLES[0].answered((1, 2))])


# --- a run -----------------------------------------------------------------------------------------------------------


def test_each_teacher_begins_where_it_should(llama: Path, tmp_path: Path) -> None:
    """`previous` and `ema` are silent in the first stage and start at 0 in the next; `base` speaks all the time."""
    kinds, trainer = {"a": "generative", "b": "label"}, {"log_every_n_steps": 1}
    terms = {}
    for teacher in ("previous", "base"):
        mitigation = SelfDistillation(teacher=teacher)  # type: ignore[arg-type]
        folder = tmp_path / teacher / "run"
        train(folder, llama, ADAPTERS["lora"].make(), {"kd": mitigation}, steps=3, kinds=kinds, trainer=trainer)
        lines = history(folder)
        terms[teacher] = [line.get(TERM) for line in lines]
        assert all(line["kd/kl"] == pytest.approx(line[TERM] / 4) for line in lines if TERM in line)
    assert terms["previous"][:3] == [None] * 3
    assert terms["previous"][3] == 0
    assert min(terms["previous"][4:]) > 0
    assert terms["base"][0] == pytest.approx(0, abs=1e-9)
    assert min(terms["base"][1:]) > 0


@pytest.mark.parametrize("options", [{}, {"teacher": "ema", "ema_rate": 0.3}, {"cache": 8}], ids=str)
def test_a_stopped_run_goes_on_bit_for_bit(options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    lines = goes_on_exactly(
        tmp_path,
        llama,
        ADAPTERS["lora"].make,
        lambda: {"kd": SelfDistillation(strength=3.0, **options)},
        data={"micro_batch_size": 2},
    )
    assert lines[-1][TERM] > 0


def test_it_holds_the_model_back(llama: Path, tmp_path: Path) -> None:
    """The stronger, the nearer to the model before the stage, on the rows it is trained on."""
    ends = []
    for strength in (1e-6, 1.0, 100.0):
        folder = tmp_path / str(strength) / "run"
        mitigation = SelfDistillation(strength=strength)
        options: dict[str, Any] = {"steps": 6, "kinds": {"a": "generative", "b": "generative"}}
        train(folder, llama, ADAPTERS["lora"].make(), {"kd": mitigation}, trainer={"log_every_n_steps": 1}, **options)
        ends.append(history(folder)[-1]["kd/kl"])
    assert ends[0] > ends[1] > ends[2]


@pytest.mark.parametrize(
    "options",
    [
        {"strength": -1.0},
        {"temperature": 0.0},
        {"ema_rate": 0.0},
        {"ema_rate": 1.5},
        {"cache": 0},
        {"batch_tokens": 0},
        {"teacher": "ema", "cache": 4},
    ],
)
def test_bad_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="SelfDistillation with"):
        SelfDistillation(**options)


def test_strength_zero_takes_part_in_nothing(llama: Path) -> None:
    mitigation = SelfDistillation(strength=0.0, cache=4)
    module = build(llama, mitigation)
    assert not mitigation.touches_training(1)
    assert mitigation.state_bytes() == 8
    assert mitigation.loss_terms(module, None, None) == {}  # type: ignore[arg-type]
    assert not SelfDistillation().touches_training(0)
    assert SelfDistillation().touches_training(1)


@pytest.mark.parametrize("name", ["slao", "progressive_prompts", "per_domain"])
def test_a_cached_previous_teacher_is_asked_before_the_adapter_begins(name: str, llama: Path) -> None:
    """These adapters begin a stage with another function; asked afterwards, the teacher was 0.02 to 0.17 nats off."""
    mitigation = SelfDistillation(cache=300, temperature=1.0)
    module = make_module(llama, ADAPTER_ROWS[name].make(), {"kd": mitigation})
    module.build(seed=0)
    options: dict[str, Any] = {"stages": 2, "seed": 0, "steps": 1, "batch_size": len(EXAMPLES)}
    module.begin_stage(Stage(index=0, domain="a", **options), EXAMPLES)
    module.model.eval()
    with torch.no_grad():
        for i, leaf in enumerate(module.adapter.trainable(module.model).values()):
            leaf += 0.3 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(i))
    module.on_train_end()
    batch = make_batch(sorted(EXAMPLES, key=len), layout=module.layout)
    with torch.no_grad():
        previous = module.forward(batch).log_softmax(-1)
        module.begin_stage(Stage(index=1, domain="b", **options), EXAMPLES)
        module.model.eval()
        assert not torch.allclose(module.forward(batch).log_softmax(-1), previous, atol=1e-3), "the function changes"
    log_probs, ids = mitigation._recall(module, batch)
    torch.testing.assert_close(log_probs, previous.gather(-1, ids), rtol=0, atol=1e-4)


def test_without_a_cache_such_an_adapter_is_refused(llama: Path) -> None:
    with pytest.raises(UserError, match="another function") as error:
        make_module(llama, ADAPTER_ROWS["per_domain"].make(), {"kd": SelfDistillation()})
    assert "cache" in str(error.value)
