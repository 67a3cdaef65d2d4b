"""The loop: every hook is called where `ContinualModule` says, with what it says, and costs nothing if unused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from residency.adapters import Full
from residency.adapters.peft import lora
from residency.core.batching import make_batch
from residency.core.signals import Stopped
from residency.core.types import Batch, Example, Outputs, Stage, Tensors
from residency.engine import module as module_file
from residency.mitigations.base import HOOKS, Mitigation, overrides
from residency.testing.tiny_runs import make_module, train


def tiny_lora() -> Any:
    return lora(r=4, target_modules="all-linear")


class Recorder(Mitigation):
    """Overrides every hook, changes nothing, writes every call down."""

    def __init__(self, calls: list[tuple[str, int]]) -> None:
        super().__init__()
        self.calls = calls

    def prepare_dataset(self, module: Any, dataset: Sequence[Example], stage: Stage) -> None:
        self.calls.append(("prepare_dataset", stage.index))

    def on_domain_start(self, module: Any, stage: Stage) -> None:
        self.calls.append(("on_domain_start", stage.index))

    def on_domain_end(self, module: Any, stage: Stage) -> None:
        assert torch.is_grad_enabled(), "estimates need gradients"
        assert not module.model.training, "estimates need dropout off"
        self.calls.append(("on_domain_end", stage.index))

    def transform_dataset(self, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        self.calls.append(("transform_dataset", stage.index))
        return dataset

    def transform_batch(self, module: Any, batch: Batch) -> Batch:
        assert module.model.training, "a pretrained model comes in evaluation mode, without dropout"
        self.calls.append(("transform_batch", module.stage.index))
        return batch

    def loss_terms(self, module: Any, batch: Batch, outputs: Outputs) -> Mapping[str, torch.Tensor]:
        self.calls.append(("loss_terms", module.stage.index))
        return {"nothing": outputs.loss * 0}

    def transform_gradients(self, module: Any, gradients: Tensors) -> Tensors:
        assert set(gradients) == set(module.adapter.trainable(module.model))
        self.calls.append(("transform_gradients", module.stage.index))
        return gradients

    def transform_update(self, module: Any, before: Tensors, after: Tensors) -> Tensors:
        assert any(not torch.equal(before[name], after[name]) for name in after)
        self.calls.append(("transform_update", module.stage.index))
        return after

    def transform_weights(self, module: Any, before: Tensors, after: Tensors) -> Tensors:
        assert list(before) == list(after)
        self.calls.append(("transform_weights", module.stage.index))
        return after

    def served_weights(self, module: Any, before: Tensors, after: Tensors) -> Tensors:
        assert list(before) == list(after)
        self.calls.append(("served_weights", module.stage.index))
        return after


STEP = ["transform_batch", "loss_terms", "transform_gradients", "transform_update"]


def test_every_hook_in_its_place(llama: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    recorder = Recorder(calls)
    assert all(overrides(recorder, hook) for hook in HOOKS)
    record, _ = train(tmp_path / "run", llama, tiny_lora(), {"recorder": recorder}, steps=2)
    whole = ["prepare_dataset", "transform_dataset", "on_domain_start"]
    whole += [*STEP, *STEP, "transform_weights", "served_weights", "on_domain_end"]
    expected = [(name, stage) for stage in range(3) for name in whole]
    assert calls == expected[:-1], "there is nothing to remember the last domain for"
    plain, _ = train(tmp_path / "plain", llama, tiny_lora(), steps=2)
    assert record["scores"] == plain["scores"], "a mitigation that changes nothing must not change a bit"


def test_hooks_with_accumulation(llama: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    data = {"micro_batch_size": 1}
    train(tmp_path / "run", llama, tiny_lora(), {"recorder": Recorder(calls)}, steps=2, data=data)
    count = Counter(name for name, _ in calls)
    assert count["transform_batch"] == count["loss_terms"] == 3 * 2 * 4
    assert count["transform_gradients"] == count["transform_update"] == 3 * 2, "once per optimizer step"


def test_domain_start_once_across_a_resume(llama: Path, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
            if (module.stage.index, trainer.global_step) == (1, 3):
                raise Stopped("SIGTERM")

    calls: list[tuple[str, int]] = []
    with pytest.raises(Stopped):
        train(tmp_path / "run", llama, tiny_lora(), {"r": Recorder(calls)}, callbacks=[Stop()])
    train(tmp_path / "run", llama, tiny_lora(), {"r": Recorder(calls)})
    starts = [stage for name, stage in calls if name == "on_domain_start"]
    ends = [stage for name, stage in calls if name == "on_domain_end"]
    assert starts == [0, 1, 2]
    assert ends == [0, 1]


class FreezeUpdate(Mitigation):
    """Freezes the first half of the columns of every matrix, after the step."""

    def transform_update(self, module: Any, before: Tensors, after: Tensors) -> Tensors:
        return {name: _frozen(before[name], after[name]) for name in after}


class FreezeGradient(Mitigation):
    """What public code does: zero the gradient of the same columns."""

    def transform_gradients(self, module: Any, gradients: Tensors) -> Tensors:
        return {name: _frozen(torch.zeros_like(g), g) for name, g in gradients.items()}


def _frozen(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if new.dim() < 2:
        return new
    half = new.shape[1] // 2
    return torch.cat([old[:, :half], new[:, half:]], 1)


def test_update_masks_hold_under_decay_and_gradient_masks_leak(llama: Path, tmp_path: Path) -> None:
    start = make_module(llama, Full(), {})
    start.build(seed=0)
    before = {name: p.detach().clone() for name, p in start.model.named_parameters() if p.dim() == 2}
    leaked = {}
    for mitigation in (FreezeUpdate(), FreezeGradient()):
        _, module = train(tmp_path / mitigation.name, llama, Full(), {"freeze": mitigation}, kinds={"a": "generative"})
        after = dict(module.model.named_parameters())
        halves = {name: slice(0, w.shape[1] // 2) for name, w in before.items()}
        assert any(not torch.equal(after[n], before[n]) for n in before), "the other half must learn"
        leaked[type(mitigation).__name__] = [
            n for n, w in before.items() if not torch.equal(after[n][:, halves[n]], w[:, halves[n]])
        ]
    assert leaked["FreezeUpdate"] == []
    assert len(leaked["FreezeGradient"]) == len(before), "decoupled weight decay moves what has no gradient"


class Louder(Mitigation):
    """Scales gradients up; clipping comes after, so nothing changes for a clipped SGD."""

    def transform_gradients(self, module: Any, gradients: Tensors) -> Tensors:
        return {name: 1024.0 * gradient for name, gradient in gradients.items()}


def test_gradients_are_transformed_before_clipping(llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"kinds": {"a": "generative"}, "steps": 1, "trainer": {"gradient_clip_val": 1e-3}}
    states = []
    for name, mitigations in (("plain", {}), ("louder", {"louder": Louder()})):
        _, module = train(tmp_path / name, llama, tiny_lora(), mitigations, **options)
        states.append(module.adapter.state(module.model))
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-4, atol=1e-6)


class TwoTerms(Mitigation):
    """Adds two constants."""

    def loss_terms(self, module: Any, batch: Batch, outputs: Outputs) -> Mapping[str, torch.Tensor]:
        return {"one": torch.tensor(1.0), "two": torch.tensor(2.0)}


def test_terms_are_logged_by_name(llama: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", llama, tiny_lora(), {"x": TwoTerms(), "y": TwoTerms()}, steps=1)
    for text in (tmp_path / "run" / "history.jsonl").read_text().splitlines():
        line = json.loads(text)
        assert (line["loss/x/one"], line["loss/y/two"]) == (1.0, 2.0)
        assert line["loss"] == pytest.approx(line["loss/task"] + 6.0, abs=1e-5)


class FirstOnly(Mitigation):
    """Trains on the first example of each batch."""

    def transform_batch(self, module: Any, batch: Batch) -> Batch:
        return make_batch(batch.examples[:1], layout=batch.layout)


def test_a_batch_can_be_replaced(llama: Path, tmp_path: Path) -> None:
    record, _ = train(tmp_path / "run", llama, tiny_lora(), {"first": FirstOnly()}, lr=1e-1)
    plain, _ = train(tmp_path / "plain", llama, tiny_lora(), lr=1e-1)
    assert record["scores"]["nll"]["R"][1] != plain["scores"]["nll"]["R"][1]


def test_unused_hooks_cost_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensors: Tensors) -> dict[str, torch.Tensor]:
        raise AssertionError("a snapshot was taken for a hook that nobody overrides")

    monkeypatch.setattr(module_file, "snapshot", refuse)
    record, _ = train(tmp_path / "run", llama, tiny_lora(), {"terms": TwoTerms()}, steps=1)
    assert record["status"] == "done"


def test_reference_forward_is_the_base_without_gradient(llama: Path, tmp_path: Path) -> None:
    _, module = train(tmp_path / "run", llama, tiny_lora())
    plain = make_module(llama, tiny_lora(), {})
    plain.build(seed=0)
    example = Example.of(domain="x", row="0", prompt=(5, 6, 7), completion=(8, 9, 0))
    batch = make_batch([example], layout="packed")
    module.model.train()
    reference = module.reference_forward(batch)
    assert not reference.requires_grad
    assert module.model.training, "the mode is restored"
    assert torch.equal(reference, plain.forward(batch).detach())
