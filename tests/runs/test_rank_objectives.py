"""Several ranks learn by every objective what one does: whole models (DDP), and a base in parts (FSDP2)."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.rank_learning import assert_equal_learning
from support.rank_runs import Group
from table import MITIGATIONS, OBJECTIVES

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:KTO on")]

IN_PARTS = [name for name, row in OBJECTIVES.items() if row.make().reads != "completion" and row.make().shardable]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(objective: str, two: Group, llama: Path, tmp_path: Path) -> None:
    assert_equal_learning(two, llama, tmp_path, "lora", learnt_by=objective)


def test_who_does_not_take_part_in_parts() -> None:
    """As `docs/devices.md` says: rows that came in later would be asked about on one rank alone."""
    assert [name for name, row in OBJECTIVES.items() if not row.make().shardable] == [
        "preference_pretrained",
        "kto_pretrained",
    ]


@pytest.mark.parametrize("objective", IN_PARTS)
def test_with_a_base_in_parts(objective: str, two: Group, llama: Path, tmp_path: Path) -> None:
    assert_equal_learning(two, llama, tmp_path, "lora", learnt_by=objective, shards=True)


@pytest.mark.parametrize("objective", [name for name in IN_PARTS if not OBJECTIVES[name].make().requires])
def test_with_all_weights_in_parts(objective: str, two: Group, llama: Path, tmp_path: Path) -> None:
    if OBJECTIVES[objective].make().keeps_start:
        with pytest.raises(AssertionError, match=r"model\.objective"):
            assert_equal_learning(two, llama, tmp_path, "full", learnt_by=objective, shards=True)
    else:
        assert_equal_learning(two, llama, tmp_path, "full", learnt_by=objective, shards=True)


@pytest.mark.parametrize("shards", [False, True])
def test_a_reward_model_of_an_earlier_stage(shards: bool, two: Group, llama: Path, tmp_path: Path) -> None:
    assert_equal_learning(two, llama, tmp_path, "lora", by_reward_model=True, shards=shards)


PAIRS = [
    (objective, mitigation)
    for objective in ("preference_sigmoid", "kto", "grpo", "reward_model")
    for mitigation in ("replay", "ewc", "gem", "mas", "self_distillation", "ema")
    if OBJECTIVES[objective].make().reads in MITIGATIONS[mitigation].make().follows
]


@pytest.mark.parametrize(("objective", "mitigation"), PAIRS)
def test_mitigations_in_parts(objective: str, mitigation: str, two: Group, llama: Path, tmp_path: Path) -> None:
    assert_equal_learning(two, llama, tmp_path, "lora", mitigation, learnt_by=objective, shards=True)
