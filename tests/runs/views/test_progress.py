"""The progress line, on a real fit of a linear model: what it says, how seldom it asks, and that it cleans up."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader

from residency.runs.views import progress
from residency.runs.views.progress import StageProgress, evaluation_progress

pytestmark = [
    # Four batches in the main process: workers would cost more than they bring.
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    # Lightning 2.6.6 calls a function of torch.utils._pytree that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]


@dataclass
class TinyBatch:
    x: torch.Tensor
    tokens: int = 100


class Tiny(LightningModule):
    def __init__(self, *, log: bool = True, fail_at: int = -1) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.log_it, self.fail_at = log, fail_at

    def training_step(self, batch: TinyBatch, index: int) -> torch.Tensor:
        if index == self.fail_at:
            raise RuntimeError("broken on purpose")
        loss: torch.Tensor = self.layer(batch.x).pow(2).mean() * 0 + 1.25
        if self.log_it:
            self.log("loss", loss, batch_size=1)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(callback: StageProgress, module: Tiny | None = None, *, resume: Path | None = None, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_steps": 4, "enable_progress_bar": False, "logger": False, "log_every_n_steps": 1}
    defaults |= {"enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[callback], **(defaults | options))
    loader: Any = DataLoader([TinyBatch(torch.ones(2)) for _ in range(4)], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module or Tiny(), loader, ckpt_path=resume)
    return trainer


def stage(**changed: Any) -> StageProgress:
    options: dict[str, Any] = {"stage": 2, "stages": 3, "domain": "medical", "cell": "ewc-s0"}
    return StageProgress(**(options | changed))


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def drawn(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def ours(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("ewc-s0")]


# -- plain --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enable", [False, True])
def test_plain_lines_go_to_stderr_and_nothing_else_is_drawn(enable: bool, capsys: pytest.CaptureFixture[str]) -> None:
    fit(stage(), enable_progress_bar=enable)
    out, err = capsys.readouterr()
    assert out == ""
    first, last = ours(err)
    assert first == "ewc-s0  2/3  medical: 4 steps"
    assert re.fullmatch(r"ewc-s0  2/3  medical: 4/4 steps \(100%\)  loss 1\.250  [\d,]+ tokens/s  in 0:\d\d", last)
    assert "\x1b" not in err
    assert "Epoch" not in err


def test_plain_lines_come_at_most_so_often(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    fit(stage())
    shown = ours(capsys.readouterr().err)
    assert [re.search(r": (\d)/4 steps", line) is not None for line in shown] == [False, True, True, True, True, True]
    assert "left" in shown[1]


def test_a_resumed_stage_starts_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(stage(), max_steps=4).save_checkpoint(tmp_path / "half.ckpt")
    capsys.readouterr()
    fit(stage(), max_steps=6, max_epochs=-1, resume=tmp_path / "half.ckpt")
    shown = ours(capsys.readouterr().err)
    assert shown[0] == "ewc-s0  2/3  medical: 6 steps, from 4"
    assert "6/6 steps (100%)" in shown[-1]


def test_a_module_that_logs_no_loss_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    fit(stage(), Tiny(log=False))
    assert "loss" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": -1, "max_epochs": 2}, "8"),
        ({"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 3}, "4"),
        ({"max_steps": 3, "max_epochs": 5}, "3"),
        ({"max_steps": 2, "max_epochs": -1}, "2"),
    ],
)
def test_the_number_of_steps(options: dict[str, Any], steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(stage(), **options)
    shown = ours(capsys.readouterr().err)
    assert shown[0].endswith(f": {steps} steps")
    assert f"{steps}/{steps} steps" in shown[-1]
    assert trainer.global_step == int(steps)


# -- terminal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_live_line_is_one_line(width: int) -> None:
    console = terminal(width)
    fit(stage(plain=False, console=console))
    frames = [frame for frame in re.split(r"[\r\n]", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", drawn(console))) if frame]
    assert all(frame.startswith("ewc-s0  2/3") and len(frame) <= width for frame in frames)
    if width >= 80:
        assert "4/4" in frames[-1]
        assert "loss 1.250" in frames[-1]
        assert "in 0:0" in frames[-1]


def test_the_loss_is_read_only_for_a_drawn_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(progress, "_loss", lambda trainer: asked.append(trainer.global_step))
    monkeypatch.setattr(progress, "LIVE_SECONDS", 60.0)
    fit(stage(plain=False, console=terminal()))
    assert asked == [4]


@pytest.mark.parametrize("plain", [True, False])
def test_a_crash_gives_the_terminal_back(plain: bool) -> None:
    console = terminal()
    with pytest.raises(RuntimeError, match="broken on purpose"):
        fit(stage(plain=plain, console=console), Tiny(fail_at=2))
    if not plain:
        assert drawn(console).rstrip().endswith("\x1b[?25h")  # the cursor is visible again


def test_names_do_no_harm(capsys: pytest.CaptureFixture[str]) -> None:
    hostile: dict[str, Any] = {"cell": "ewc-s0 [bold]{x}", "domain": "[/]\x1b[2J\n{task}" + "y" * 200}
    fit(stage(**hostile))
    first, _ = ours(capsys.readouterr().err)
    assert first.startswith("ewc-s0 [bold]{x}  2/3  [/][2J {task}")
    assert len(first) < 80
    console = terminal()
    fit(stage(plain=False, console=console, **hostile))
    assert "ewc-s0 [bold]{x}" in drawn(console)
    assert "\x1b[2J" not in drawn(console)


# -- evaluation ---------------------------------------------------------------------------------------------------


def test_evaluation_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with evaluation_progress("after [red]medical", 30) as advance:
        for _ in range(3):
            advance(10)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "scoring after [red]medical: 30 rows"
    assert re.fullmatch(r"scoring after \[red\]medical: 30/30 rows \(100%\)  in 0:00", last)


def test_evaluation_live_and_interrupted() -> None:
    console = terminal()
    with evaluation_progress("base", 0, plain=False, console=console):
        pass

    def interrupted() -> None:
        with evaluation_progress("base", 20, plain=False, console=console) as advance:
            advance(10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert drawn(console).rstrip().endswith("\x1b[?25h")
