"""An objective without noise keeps gradient checkpointing, or the two are refused together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from residency.adapters.peft import lora
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Example
from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.engine.stage_overrides import StageOverrides, StageSettings
from residency.engine.trainers import Trainers
from residency.engine.training_mode import cut_noise, noise_of, trained_noise, trains_in_training_mode
from residency.runs.folder import RunFolder
from residency.runs.settings import StreamSettings
from residency.runs.stream import train_stream
from residency.runs.views.base import RunInfo, View
from residency.testing.tiny_runs import domains, make_module
from table import OBJECTIVES


class Said(View):
    """Keeps what a run says before its first step."""

    notices: Sequence[str] = ()

    def start(self, info: RunInfo, history: list[dict[str, Any]], rows: list[Mapping[str, Any]]) -> None:
        self.notices = info.notices


TWO_STEPS = Trainers(lambda: {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False})
QUIET = [name for name, row in OBJECTIVES.items() if not row.make().forward_noise]


def module_of(folder: Path, objective: str, *, again: bool, dropout: float = 0.0) -> ContinualModule:
    adapter = lora(target_modules="all-linear", r=2, lora_dropout=dropout)
    return make_module(
        folder, adapter, {}, objective=OBJECTIVES[objective].make(), loading={"gradient_checkpointing": again}
    )


def layers_run(module: ContinualModule) -> int:
    """Forward passes of the first layer in one forward and backward pass."""
    count = 0

    def add(*_: Any) -> None:
        nonlocal count
        count += 1

    module.model.train(trains_in_training_mode(module.objective, module.model))
    layer = next(m for name, m in module.model.named_modules() if name.endswith("layers.0.self_attn"))
    handle = layer.register_forward_hook(add)
    example = Example.of(domain="x", row="0", prompt=(5, 6, 7), completion=(40, 50, 0))
    module.forward(make_batch([example], layout="padded")).sum().backward()
    handle.remove()
    return count


def test_activations_are_computed_again(llama: Path) -> None:
    for again in (False, True):
        module = module_of(llama, QUIET[0], again=again)
        module.build(seed=0)
        assert layers_run(module) == 1 + again


@pytest.mark.parametrize("objective", QUIET)
def test_noise_and_checkpointing_are_refused(objective: str, llama: Path) -> None:
    with pytest.raises(UserError, match=r"gradient_checkpointing with .* and .*dropout") as error:
        module_of(llama, objective, again=True, dropout=0.1).build(seed=0)
    assert "micro_batch_size" in str(error.value)
    module_of(llama, objective, again=False, dropout=0.1).build(seed=0)


def test_an_objective_of_a_single_stage_is_refused_before_the_first(llama: Path) -> None:
    module = module_of(llama, "sft", again=True, dropout=0.1)
    module.stage_settings = StageSettings(own={"b": StageOverrides(objective=OBJECTIVES[QUIET[0]].make())})
    with pytest.raises(UserError, match=r"gradient_checkpointing with .* and .*dropout"):
        module.build(seed=0)


def test_with_noise_nothing_changes(llama: Path) -> None:
    module = module_of(llama, "sft", again=True, dropout=0.1)
    module.build(seed=0)
    assert trains_in_training_mode(module.objective, module.model)


def test_noise_is_found_wherever_it_is() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_dropout = 0.2
            self.inner = nn.Dropout(0.1)
            self.idle = nn.Dropout(0.0)

    assert noise_of(nn.Sequential(Layer())) == ["0.inner 0.1", "0.attention_dropout 0.2"]
    assert noise_of(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("objective", ["sft", *QUIET[:2]])
def test_only_noise_that_is_drawn_is_told(objective: str, llama: Path) -> None:
    module = module_of(llama, objective, again=False, dropout=0.1)
    module.build(seed=0)
    told = cut_noise(trained_noise([module.objective], module.model), parts=4)
    assert bool(told) == (objective not in QUIET)
    assert not told or ("lora_dropout" in told and "a step has 4" in told)


def test_a_step_in_one_piece_has_nothing_to_tell() -> None:
    assert cut_noise(["attention 0.1"], parts=1) == cut_noise([], parts=8) == ""


@pytest.mark.parametrize(("dropout", "micro"), [(0.2, 2), (0.2, 4), (0.0, 2)])
def test_a_run_says_that_its_masks_follow_the_cut(dropout: float, micro: int, llama: Path, tmp_path: Path) -> None:
    """Before the first step, where another cut would train otherwise; and it does."""
    said, weights = "", []
    for size in (4, micro):
        view = Said()
        adapter = lora(target_modules="all-linear", r=2, lora_dropout=dropout)
        module = make_module(llama, adapter, {}, optimizer=torch.optim.SGD, lr=0.05)
        stream = StreamData(domains=domains(tmp_path / "data", {"a": "label"}), batch_size=4, micro_batch_size=size)
        folder, settings = RunFolder(tmp_path / f"{len(weights)}"), StreamSettings(cell="tiny", seed=0)
        train_stream(
            module=module,
            data=stream,
            trainers=TWO_STEPS,
            folder=folder,
            settings=settings,
            views=[view],
        )
        weights.append(module.adapter.state(module.model))
        said = " ".join(view.notices)
    same = all(torch.allclose(weights[0][n], t, rtol=1e-4, atol=1e-6) for n, t in weights[1].items())
    assert same == (not said), said
    assert bool(said) == (dropout > 0 and micro < 4)
