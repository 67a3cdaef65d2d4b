"""Every objective with every mitigation: how a step is cut, and how its rows lie, changes no gradient and no weight.

In float64 with AdamW, whose first steps divide a gradient by its own size: where one is exactly zero but for rounding
(a factor of LoRA, a direction that is projected out) float32's rounding becomes a whole step, and nothing that is equal
in exact arithmetic would be equal here. `test_global_batch.py` has every mitigation in float32, with SGD.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from residency.core.types import Layout
from support.cuts import BATCH, STAGES, Cuts, assert_same
from table import MITIGATIONS, OBJECTIVES

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
EVERY_CUT: list[tuple[int, Layout]] = [
    *((micro, "packed") for micro in (1, 2, 4)),
    *((micro, "padded") for micro in (1, 2, 4, 8)),
]
SOME_CUTS: list[tuple[int, Layout]] = [(1, "padded"), (2, "packed"), (4, "padded")]


def _follows(mitigation: str, objective: str) -> bool:
    return OBJECTIVES[objective].make().reads in MITIGATIONS[mitigation].make().follows


def _rows() -> list[Any]:
    """Each objective with one mitigation that follows it in every run, which goes on from objective to objective; the
    others, and each alone in every cut and layout, are marked."""
    found = []
    for i, objective in enumerate(OBJECTIVES):
        partners = [name for name in MITIGATIONS if _follows(name, objective)]
        chosen = partners[i * 7 % len(partners)]
        found.append(pytest.param(objective, "", EVERY_CUT, id=objective, marks=pytest.mark.pairs))
        for name in partners:
            cuts, marks = (SOME_CUTS[:2], ()) if name == chosen else (SOME_CUTS, pytest.mark.pairs)
            found.append(pytest.param(objective, name, cuts, id=f"{objective}-{name}", marks=marks))
    return found


@pytest.mark.parametrize(("objective", "mitigation", "cuts"), _rows())
def test_a_step_is_the_same_however_it_is_cut(
    objective: str, mitigation: str, cuts: list[tuple[int, Layout]], llama: Path, tmp_path: Path
) -> None:
    row = OBJECTIVES[objective]
    run = Cuts(
        llama,
        tmp_path,
        mitigation=MITIGATIONS[mitigation].make if mitigation else None,
        objective=row.make,
        optimizer=ADAMW,
        double=True,
        kind=row.make().reads,
    )
    gradients, weights = run.second(BATCH, "packed")
    assert len(gradients) == STAGES[1].steps
    assert any(tensor.abs().max() > 0 for tensor in gradients[0].values()), "nothing is learnt"
    for micro, layout in cuts:
        found, after = run.second(micro, layout)
        how = f"in {layout} micro-batches of {micro}"
        for step, (one, other) in enumerate(zip(gradients, found, strict=True), 1):
            assert_same(one, other, f"gradients of step {step} {how}")
        assert_same(weights, after, f"weights {how}")
