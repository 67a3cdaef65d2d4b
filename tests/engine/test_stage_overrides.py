"""What one stage does otherwise than its run: numbers that are refused, rates that are exact, words for a plan."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from residency.adapters import Peft
from residency.core.errors import UserError
from residency.core.types import Stage
from residency.engine.stage_overrides import StageOverrides, at_rate, check_overrides, describe_stages, stage_config
from residency.objectives import DFT
from support.peft_configs import CONFIGS
from support.tuned_models import attach

DOMAINS = {"a": None, "b": None}


@pytest.mark.parametrize(
    ("own", "tokens", "said"),
    [
        ({"z": StageOverrides(epochs=1)}, None, "stages names z, data.domains has a, b"),
        ({"a": StageOverrides(epochs=1, steps=2)}, None, "stages.a has epochs and steps"),
        ({"a": StageOverrides(lr=1e-3, optimizer=torch.optim.SGD)}, None, "stages.a has lr and optimizer"),
        ({"a": StageOverrides(epochs=0)}, None, "stages.a.epochs is 0"),
        ({"a": StageOverrides(steps=-3)}, None, "stages.a.steps is -3"),
        ({"a": StageOverrides(batch_size=0)}, None, "stages.a.batch_size is 0"),
        ({"a": StageOverrides(lr=float("nan"))}, None, "stages.a.lr is nan"),
        ({"a": StageOverrides(lr=-1.0)}, None, "stages.a.lr is -1.0"),
        ({"b": StageOverrides(steps=4)}, 1000, "stages.b has steps, and stage_tokens is 1,000"),
    ],
)
def test_numbers_that_cannot_be_are_refused(own: dict[str, StageOverrides], tokens: int | None, said: str) -> None:
    with pytest.raises(UserError) as refused:
        check_overrides(own, domains=DOMAINS, stage_tokens=tokens)
    assert refused.value.got == said
    assert refused.value.why
    assert refused.value.fix


def test_what_can_be_is_not_refused() -> None:
    own = {"a": StageOverrides(epochs=2, lr=0.0, batch_size=1), "b": StageOverrides(objective=DFT())}
    check_overrides(own, domains=DOMAINS)
    check_overrides({"a": StageOverrides(lr=1e-3)}, domains=DOMAINS, stage_tokens=1000)


def test_a_rate_is_that_of_an_optimizer_that_was_made_with_it(llama: Any) -> None:
    """Ratios of an adapter are taken of the new rate: bit for bit, which keys rely on."""
    adapter = Peft(config=CONFIGS["lora"](), lr_ratio=3.7)
    model = attach(llama, adapter)
    made, again = (
        adapter.optimizer(model, factory)
        for factory in (partial(torch.optim.AdamW, lr=1e-3), at_rate(partial(torch.optim.AdamW, lr=0.02), 1e-3))
    )
    assert [g["lr"] for g in made.param_groups] == [g["lr"] for g in again.param_groups] == [1e-3, 1e-3 * 3.7]
    assert made.defaults["lr"] == again.defaults["lr"]


def test_equal_settings_are_written_equally_wherever_they_stand() -> None:
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02, "weight_decay": 0.1}}
    slow = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4, "weight_decay": 0.1}}
    sft, cosine = {"class_path": "residency.objectives.SFT"}, {"class_path": "residency.engine.schedules.StageSchedule"}
    config = {
        "model": {"objective": sft, "optimizer": adamw, "scheduler": None},
        "data": {"batch_size": 8},
        "stages": {"a": {"lr": 1e-4, "scheduler": cosine, "batch_size": 4, "epochs": None}},
    }
    whole = {"model": {"objective": sft, "optimizer": slow, "scheduler": cosine}, "data": {"batch_size": 4}}
    assert stage_config(config, "a") == stage_config(whole, "a") == stage_config(whole, "b")
    assert stage_config(config, "b") == stage_config({**config, "stages": None}, "a")
    assert config["model"]["optimizer"]["init_args"]["lr"] == 0.02, "the config itself was changed"


def test_a_plan_names_what_differs() -> None:
    stages = [
        Stage(index=i, domain=n, stages=2, seed=0, steps=s, batch_size=b)
        for i, (n, s, b) in enumerate([("a", 30, 8), ("b", 5, 2)])
    ]
    own = {"b": StageOverrides(steps=5, batch_size=2, lr=1e-4, objective=DFT())}
    assert describe_stages(stages, own) == ["a: 30 steps of 8 rows", "b: 5 steps of 2 rows (lr 0.0001, objective DFT)"]
    assert describe_stages(stages, {}) == describe_stages(stages, {"b": StageOverrides()}) == []
    assert describe_stages(stages[:1], own) == []
