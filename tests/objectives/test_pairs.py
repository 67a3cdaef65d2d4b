"""Every objective with every mitigation, on LoRA and on full fine-tuning: it runs and goes on after a kill, or not.

Two stages of two steps; the second is stopped after its first step and continued in a fresh model: equal bit for bit.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from residency.backbones import CausalLM
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree
from residency.core.types import Stage
from residency.engine.checkpointing import History
from residency.engine.module import ContinualModule
from residency.engine.stage import finish_stage, restore_stage, train_stage
from support.comparisons import clone, differing
from support.fit_without_trainer import Fits
from support.objective_rows import ExampleData
from support.tiny_runs import domains
from table import ADAPTERS, MITIGATIONS, OBJECTIVES

CPU = torch.device("cpu")
STAGES = [Stage(index=i, domain=d, stages=2, seed=0, steps=2, batch_size=4) for i, d in enumerate("ab")]
SOME_OBJECTIVES = ("flow", "preference_sigmoid", "kto", "rloo", "dapo", "label_policy")
SOME_MITIGATIONS = ("ewc", "replay", "self_distillation", "gem", "weight_mixing")
COMBINATIONS = [
    pytest.param(
        o, m, a, marks=() if a == "lora" and o in SOME_OBJECTIVES and m in SOME_MITIGATIONS else pytest.mark.pairs
    )
    for o in OBJECTIVES
    for m in MITIGATIONS
    for a in ("lora", "full")
]


def module(backbone: Path, objective: str, mitigation: str, adapter: str) -> ContinualModule:
    row = ADAPTERS[adapter]
    made = ContinualModule(
        backbone=CausalLM(path=str(backbone)),
        adapter=row.make(),
        objective=OBJECTIVES[objective].make(),
        mitigations={mitigation: MITIGATIONS[mitigation].make()},
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )
    made.build(seed=0)
    return made


def fit(made: ContinualModule, data: ExampleData, stage: Stage, folder: Path, *, every: int = 0) -> list[Any]:
    lines: list[Any] = []
    train_stage(
        module=made,
        data=data,
        trainers=Fits(lambda: {}),
        stage=stage,
        folder=folder,
        history=History(stage=stage, every_n_steps=1, offset=0, write=lines.append),
        observers=[],
        checkpoint_every_n_steps=every,
    )
    return lines


@pytest.mark.filterwarnings("ignore:KTO on")  # replay takes the place of some of the few rows
@pytest.mark.parametrize(("objective", "mitigation", "adapter"), COMBINATIONS)
def test_a_pair_runs_or_is_refused(objective: str, mitigation: str, adapter: str, llama: Path, tmp_path: Path) -> None:
    kind, made = OBJECTIVES[objective].make().reads, MITIGATIONS[mitigation].make()
    data = ExampleData(domains=domains(tmp_path / "data", {"a": "label", "b": "label"}), kind=kind)
    missing = made.requires | OBJECTIVES[objective].make().requires
    if kind not in made.follows or not missing <= ADAPTERS[adapter].make().provides:
        with pytest.raises(UserError) as refused:
            module(llama, objective, mitigation, adapter)
        assert "model.mitigations" in str(refused.value) or "model.objective" in str(refused.value)
        return
    first = module(llama, objective, mitigation, adapter)
    lines = fit(first, data, STAGES[0], tmp_path / "work")
    between = clone(finish_stage(first, {}, device=CPU))
    lines += fit(first, data, STAGES[1], tmp_path / "work", every=1)
    stopped = (tmp_path / "work" / "checkpoint.safetensors").read_bytes()
    whole = clone(finish_stage(first, {}, device=CPU))
    assert int(load_tree(tmp_path / "work" / "checkpoint.safetensors")["global_step"]) == 1
    assert all(tensor.isfinite().all() for tensor in whole["weights"].values() if tensor.is_floating_point())
    assert differing(whole["weights"], between["weights"]) or mitigation == "ema"
    again = module(llama, objective, mitigation, adapter)
    restore_stage(again, clone(between))
    (tmp_path / "work" / "checkpoint.safetensors").write_bytes(stopped)
    fit(again, data, STAGES[1], tmp_path / "work")
    rest = finish_stage(again, {}, device=CPU)
    assert not differing(*({name: tree[name] for name in ("weights", "mitigations")} for tree in (whole, rest)))
