"""An objective with a mitigation and an adapter: it runs and goes on after a kill, or is refused before it begins.

Two stages of two steps; the second is stopped after its first step and continued in a fresh module: equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from residency.testing.comparisons import clone, differing
from residency.testing.fit_without_trainer import Fits
from residency.testing.objective_rows import ExampleData
from residency.testing.rows import AdapterRow, MitigationRow, ObjectiveRow
from residency.testing.tiny_runs import domains

__all__ = ["runs_or_is_refused"]

CPU = torch.device("cpu")
STAGES = [Stage(index=i, domain=d, stages=2, seed=0, steps=2, batch_size=4) for i, d in enumerate("ab")]


def runs_or_is_refused(
    *, backbone: Path, folder: Path, objective: ObjectiveRow, mitigation: MitigationRow, adapter: AdapterRow
) -> None:
    """Train the three together, and once more from a checkpoint.

    Args:
        backbone: Folder of the tiny model.
        folder: For data and checkpoints; empty.
        objective: With what it reads.
        mitigation: Follows that, or is refused.
        adapter: Provides what both require, or it is refused.

    Raises:
        AssertionError: Saying what does not hold.
    """
    made, follower = objective.make(), mitigation.make()
    data = ExampleData(domains=domains(folder / "data", {"a": "label", "b": "label"}), kind=made.reads)
    build = partial(_module, backbone, {"objective": objective, "mitigation": mitigation, "adapter": adapter})
    if made.reads not in follower.follows or not follower.requires | made.requires <= adapter.make().provides:
        with pytest.raises(UserError) as refused:
            build()
        said = str(refused.value)
        assert "model.mitigations" in said or "model.objective" in said, f"the refusal names no part: {said}"
        return
    work = folder / "work"
    first = build()
    _fit(first, data, STAGES[0], work)
    between = clone(finish_stage(first, {}, device=CPU))
    _fit(first, data, STAGES[1], work, every=1)
    stopped = (work / "checkpoint.safetensors").read_bytes()
    whole = clone(finish_stage(first, {}, device=CPU))
    assert int(load_tree(work / "checkpoint.safetensors")["global_step"]) == 1
    for name, tensor in whole["weights"].items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), f"{name} is not finite"
    assert differing(whole["weights"], between["weights"]), "the second stage changed nothing"
    again = build()
    restore_stage(again, clone(between))
    (work / "checkpoint.safetensors").write_bytes(stopped)
    _fit(again, data, STAGES[1], work)
    rest = finish_stage(again, {}, device=CPU)
    one, other = ({name: tree[name] for name in ("weights", "mitigations")} for tree in (whole, rest))
    found = differing(one, other)
    assert not found, f"{found[0]} differs from the uninterrupted run"


def _module(backbone: Path, rows: Mapping[str, Any]) -> ContinualModule:
    module = ContinualModule(
        backbone=CausalLM(path=str(backbone)),
        adapter=rows["adapter"].make(),
        objective=rows["objective"].make(),
        mitigations={"mitigation": rows["mitigation"].make()},
        optimizer=partial(torch.optim.AdamW, lr=1e-2),  # type: ignore[arg-type]
    )
    module.build(seed=0)
    return module


def _fit(module: ContinualModule, data: ExampleData, stage: Stage, folder: Path, *, every: int = 0) -> None:
    train_stage(
        module=module,
        data=data,
        trainers=Fits(lambda: {}),
        stage=stage,
        folder=folder,
        history=History(stage=stage, every_n_steps=1, offset=0, write=lambda line: None),
        observers=[],
        checkpoint_every_n_steps=every,
    )
