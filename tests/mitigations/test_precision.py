"""Every precision that Lightning offers, on a CPU, for every mitigation over three domains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from residency.adapters import Full
from residency.adapters.peft import lora
from residency.core.errors import UserError
from residency.core.tensors import remembered
from residency.engine.trainers import Trainers
from residency.scorers.find import scorers_by_name
from residency.testing.tiny_runs import domains, train
from table import MITIGATIONS

HALF = {torch.float16, torch.bfloat16}
PRECISIONS = ["bf16-mixed", "bf16-true", "16-mixed", "64-true"]
SOME = ("ewc", "fisher_merge", "agem", "self_distillation_ema", "replay")


def _float_states(module: Any) -> dict[str, torch.dtype]:
    found: dict[str, torch.dtype] = {}
    for name, mitigation in module.mitigations.items():
        for key, value in mitigation.state.items():
            tensors = value.items() if isinstance(value, dict) else [("", value)]
            found |= {f"{name}.{key}.{n}": t.dtype for n, t in tensors if t.is_floating_point()}
    return found


def _run(folder: Path, llama: Path, mitigation: str, precision: str) -> tuple[dict[str, Any], Any]:
    parts = {"x": MITIGATIONS[mitigation].make()} if mitigation else {}
    readers = domains(folder / "data")
    for reader in readers.values():
        reader.scorers = scorers_by_name(["nll"], where="a test")
    trainer = {"precision": precision} if precision != "bf16 leaves" else {}
    return train(
        folder / "run",
        llama,
        Full() if precision == "bf16 leaves" else lora(target_modules="all-linear", r=2),
        parts,
        steps=2,
        lr=1e-3,
        trainer=trainer,
        data={"domains": readers},
        loading={"dtype": "bfloat16"} if precision == "bf16 leaves" else {},
    )


# A CPU has no float16 autocast: Lightning takes bfloat16 and says so.
@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize("precision", ["bf16 leaves", *PRECISIONS])
@pytest.mark.parametrize(
    "mitigation",
    [pytest.param(name, marks=() if name in SOME else pytest.mark.pairs) for name in MITIGATIONS],
)
def test_a_mitigation_in_every_precision(mitigation: str, precision: str, llama: Path, tmp_path: Path) -> None:
    if precision == "bf16 leaves" and not MITIGATIONS[mitigation].make().requires <= Full().provides:
        with pytest.raises(UserError, match=r"model\.mitigations\.x"):
            _run(tmp_path, llama, mitigation, precision)
        return
    record, module = _run(tmp_path, llama, mitigation, precision)
    last = record["scores"]["nll"]["R"][-1]
    assert all(torch.tensor(last).isfinite())
    kept = {name for name, dtype in _float_states(module).items() if dtype in HALF and ".teacher." not in name}
    assert not {n for n in kept if any(k in n for k in (".precision", ".anchor", ".merged", ".average", ".path"))}


def test_what_is_remembered_is_not_rounded_to_what_trains() -> None:
    halves = {"w": torch.ones(2, dtype=torch.bfloat16), "v": torch.ones(2, dtype=torch.float64)}
    assert {name: t.dtype for name, t in remembered(halves).items()} == {"w": torch.float32, "v": torch.float64}


def test_a_batch_is_left_as_it_is(llama: Path) -> None:
    trainer = Trainers(lambda: {"accelerator": "cpu", "precision": "bf16-true"})._probe
    marker = object()
    assert trainer.precision_plugin.convert_input(marker) is marker


class FirstStep(Callback):
    """Counts, number by number, what the first step was to move and has not."""

    lost: float | None = None

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if self.lost is None:
            self.before = {name: p.detach().clone() for name, p in module.model.named_parameters()}

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if self.lost is None:
            moving = [
                (now, then)
                for name, p in module.model.named_parameters()
                if p.grad is not None
                for now, then, slope in zip(
                    p.flatten().tolist(), self.before[name].flatten().tolist(), p.grad.flatten().tolist(), strict=True
                )
                if slope
            ]
            self.lost = sum(now == then for now, then in moving) / len(moving)


@pytest.mark.parametrize(("lr", "told"), [(1e-7, True), (1e-5, True), (1e-1, False)])
def test_updates_that_are_rounded_away_are_told(lr: float, told: bool, llama: Path, tmp_path: Path) -> None:
    count = FirstStep()

    def go() -> None:
        options: dict[str, Any] = {"kinds": {"a": "label"}, "loading": {"dtype": "bfloat16"}, "callbacks": [count]}
        train(tmp_path / "run", llama, Full(), {}, steps=1, lr=lr, **options)

    if told:
        with pytest.warns(UserWarning, match=r"\d+% of the first step's updates are lost to rounding") as said:
            go()
        assert any(str(warning.message).startswith(f"{count.lost:.0%} of the first") for warning in said)
    else:
        go()
        assert count.lost is not None
        assert count.lost < 0.5


def test_pure_float16_is_refused() -> None:
    with pytest.raises(UserError, match="16-true") as error:
        _ = Trainers(lambda: {"accelerator": "cpu", "precision": "16-true"}).world_size
    assert "bf16-true" in str(error.value)
