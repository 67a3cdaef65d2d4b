"""One normaliser per step: how a batch is cut into micro-batches changes no gradient and no weight."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.errors import UserError
from residency.core.tensors import snapshot
from residency.core.types import Stage, Tensors
from residency.domains.jsonl import Jsonl
from residency.domains.stream_data import StreamData
from residency.domains.template import Template
from residency.engine.checkpointing import History
from residency.engine.module import ContinualModule
from residency.engine.stage import finish_stage, restore_stage, train_stage
from residency.engine.trainers import Trainers
from residency.mitigations import Mitigation
from residency.objectives import SFT
from residency.testing.comparisons import clone
from residency.testing.fit_without_trainer import Fits
from residency.testing.tiny_runs import domains, train
from table import MITIGATIONS, OBJECTIVES

BATCH = 8
STAGES = [Stage(index=i, domain=d, stages=2, seed=0, steps=2, batch_size=BATCH) for i, d in enumerate("ab")]
CPU = torch.device("cpu")


class Seen(Mitigation):
    """The gradients of every step after all other mitigations."""

    first_domain = 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Tensor]] = []

    def transform_gradients(self, module: Any, gradients: Tensors) -> Tensors:
        self.steps.append({name: gradient.clone() for name, gradient in gradients.items()})
        return gradients


class Cuts:
    """Trains the second stage of a mitigation in micro-batches of any size, from one first stage."""

    def __init__(self, backbone: Path, folder: Path, mitigation: str, layout: str, objective: Any = SFT) -> None:
        self.backbone = backbone
        self.folder = folder
        self.mitigation = mitigation
        self.layout = layout
        self.objective = objective
        self.readers = domains(folder / "data", {"a": "generative", "b": "label"})
        module, _ = self.module()
        self._fit(module, STAGES[0], BATCH)
        self.between = clone(finish_stage(module, {}, device=CPU))

    def module(self) -> tuple[ContinualModule, Seen]:
        parts: dict[str, Mitigation] = {"x": MITIGATIONS[self.mitigation].make()} if self.mitigation else {}
        seen = Seen()
        module = ContinualModule(
            backbone=CausalLM(path=str(self.backbone)),
            adapter=lora(target_modules="all-linear", r=2, lora_alpha=4),
            objective=self.objective(),
            mitigations={**parts, "seen": seen},
            optimizer=partial(torch.optim.SGD, lr=0.05, weight_decay=0.1),
            layout=self.layout,  # type: ignore[arg-type]
        )
        module.build(seed=0)
        return module, seen

    def _fit(self, module: ContinualModule, stage: Stage, micro: int) -> None:
        train_stage(
            module=module,
            data=StreamData(domains=self.readers, batch_size=BATCH, micro_batch_size=micro),
            trainers=Fits(lambda: {}),
            stage=stage,
            folder=self.folder / "work",
            history=History(stage=stage, every_n_steps=1, offset=0, write=lambda line: None),
            observers=[],
            checkpoint_every_n_steps=0,
        )

    @cache  # noqa: B019  # lives as long as its test
    def second(self, micro: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """The gradients of both steps and the weights after them."""
        module, seen = self.module()
        restore_stage(module, clone(self.between))
        self._fit(module, STAGES[1], micro)
        return seen.steps, snapshot(module.adapter.trainable(module.model))


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str) -> None:
    """Equal to 1e-5 of the norm of all tensors together."""
    size = torch.stack([t.norm() for t in one.values()]).norm()
    apart = torch.stack([(one[name] - other[name]).norm() for name in one]).norm()
    assert apart <= 1e-5 * size, f"{what} differ by {float(apart / size):.1e}"


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("mitigation", ["", *MITIGATIONS])
def test_micro_batches_change_no_gradient(mitigation: str, layout: str, llama: Path, tmp_path: Path) -> None:
    cuts = Cuts(llama, tmp_path, mitigation, layout)
    gradients, weights = cuts.second(BATCH)
    assert len(gradients) == STAGES[1].steps
    for micro in (1, 2, 4):
        found, after = cuts.second(micro)
        for step, (one, other) in enumerate(zip(gradients, found, strict=True), 1):
            assert_same(one, other, f"gradients of step {step} in micro-batches of {micro}")
        assert_same(weights, after, f"weights in micro-batches of {micro}")


@pytest.mark.parametrize("objective", [name for name, row in OBJECTIVES.items() if row.make().reads == "completion"])
def test_every_objective_has_one_normaliser(objective: str, llama: Path, tmp_path: Path) -> None:
    cuts = Cuts(llama, tmp_path, "", "packed", OBJECTIVES[objective].make)
    (first, *_), _ = cuts.second(BATCH)
    (cut, *_), _ = cuts.second(2)
    assert_same(first, cut, "gradients")


def _uneven(folder: Path) -> dict[str, str]:
    paths = {}
    for split, first in (("train", 10), ("test", 50)):
        rows = [{"prompt": f"{first + i}", "completion": "ab" if i % 2 else "abcdefgh" * 5} for i in range(16)]
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths[split] = str(path)
    return paths


def test_thirty_steps_of_adamw_learn_the_same(llama: Path, tmp_path: Path) -> None:
    """Completions of 3 and 41 tokens: a mean of means weighs a token of a short one up to 13 times as much."""
    template = Template(prompt="{prompt}>", completion="{completion}", max_prompt_tokens=8, max_tokens=64)
    reader = Jsonl(**_uneven(tmp_path), template=template, scorers=["nll"])
    scores = []
    for micro in (8, 1):
        data = {"domains": {"a": reader}, "batch_size": 8, "micro_batch_size": micro}
        record, _ = train(tmp_path / str(micro), llama, lora(target_modules="all-linear", r=2), data=data, steps=30)
        scores.append(record["scores"]["nll"]["R"][1][0])
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


OVERWRITTEN = {
    "accumulate_grad_batches": (4, "data.micro_batch_size"),
    "limit_train_batches": (0.5, "trainer.max_steps"),
    "max_time": ("00:00:10:00", "trainer.max_epochs"),
    "fast_dev_run": (True, "trainer.max_steps"),
    "enable_checkpointing": (True, "checkpoint_every_n_steps"),
    "default_root_dir": ("elsewhere", "--run_dir"),
    "num_sanity_val_steps": (2, "evaluation"),
    "check_val_every_n_epoch": (3, "evaluation"),
    "overfit_batches": (2, "max_train"),
}


@pytest.mark.parametrize("option", OVERWRITTEN)
def test_what_a_stream_overwrites_is_refused(option: str) -> None:
    value, instead = OVERWRITTEN[option]
    with pytest.raises(UserError) as error:
        _ = Trainers(lambda: {"accelerator": "cpu", option: value}).world_size
    assert f"trainer.{option}={value}" in str(error.value)
    assert instead in str(error.value)


def test_the_trainers_defaults_are_no_request() -> None:
    """A resolved config names every option."""
    defaults = {name: p.default for name, p in inspect.signature(Trainer.__init__).parameters.items() if name != "self"}
    assert Trainers(lambda: {**defaults, "accelerator": "cpu", "devices": 1}).world_size == 1
