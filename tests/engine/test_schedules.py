"""Schedules against transformers' own, and against their formula on the steps of a stage."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from residency.adapters.peft import lora
from residency.engine.schedules import StageSchedule, lr_factor, stage_scheduler
from residency.testing.tiny_runs import train


def _rates(schedule: object, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()  # type: ignore[attr-defined]
    return found


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)


@pytest.mark.parametrize(
    ("decay", "theirs"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_without_warmup_as_transformers(decay: str, theirs: object) -> None:
    one, other = _optimizer(), _optimizer()
    ours = stage_scheduler(lambda o: StageSchedule(o, warmup=0, decay=decay), one, steps=17)  # type: ignore[arg-type]
    reference = theirs(other, num_warmup_steps=0, num_training_steps=17)  # type: ignore[operator]
    assert _rates(ours, one, 17) == pytest.approx(_rates(reference, other, 17), abs=1e-12)


def test_warmup_ends_at_the_peak_and_the_floor_is_approached() -> None:
    shape = {"steps": 100, "warmup": 4, "decay": "cosine", "floor": 0.1}
    factors = [lr_factor(step, **shape) for step in range(100)]  # type: ignore[arg-type]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[52] == pytest.approx(0.1 + 0.9 * 0.5)
    assert all(a >= b for a, b in itertools.pairwise(factors[4:]))
    assert 0.1 <= factors[-1] < 0.101


def test_every_stage_has_a_schedule_of_its_own_length(llama: Path, tmp_path: Path) -> None:
    """Groups with rates of their own (LoRA+) keep their ratio."""
    from residency.adapters import Peft
    from residency.runs.folder import RunFolder

    adapter = Peft(config=lora(r=2, target_modules="all-linear").config, lr_ratio=4.0)
    folder = tmp_path / "run"
    train(folder, llama, adapter, steps=4, scheduler=lambda o: StageSchedule(o, warmup=0.5, decay="linear"))
    lines = RunFolder(folder).history()
    rates = [line["lr"] for line in lines if line["stage"] == 1]
    assert len(rates) == 4
    # A line is written behind the schedule's step: it names the rate of the next step.
    assert rates == pytest.approx(
        [0.01 * lr_factor(s, steps=4, warmup=2, decay="linear", floor=0.0) for s in (1, 2, 3, 4)]
    )
    assert rates == [line["lr"] for line in lines if line["stage"] == 2]
