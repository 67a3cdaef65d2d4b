"""Every objective with every mitigation, on LoRA and on full fine-tuning: it runs and goes on after a kill, or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from residency.testing.objective_pairs import runs_or_is_refused
from table import ADAPTERS, MITIGATIONS, OBJECTIVES

SOME_OBJECTIVES = ("flow", "preference_sigmoid", "kto", "rloo", "dapo", "label_policy")
# `tests/test_conformance.py` has EWC and replay, with every objective.
SOME_MITIGATIONS = ("self_distillation", "gem", "weight_mixing")
COMBINATIONS = [
    pytest.param(
        o, m, a, marks=() if a == "lora" and o in SOME_OBJECTIVES and m in SOME_MITIGATIONS else pytest.mark.pairs
    )
    for o in OBJECTIVES
    for m in MITIGATIONS
    for a in ("lora", "full")
]


@pytest.mark.parametrize(("objective", "mitigation", "adapter"), COMBINATIONS)
def test_a_pair_runs_or_is_refused(objective: str, mitigation: str, adapter: str, llama: Path, tmp_path: Path) -> None:
    rows = {"objective": OBJECTIVES[objective], "mitigation": MITIGATIONS[mitigation], "adapter": ADAPTERS[adapter]}
    runs_or_is_refused(backbone=llama, folder=tmp_path, **rows)
