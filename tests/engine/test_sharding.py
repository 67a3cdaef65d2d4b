"""Who takes part where every rank has a part of the base: said before a model is loaded."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

from residency.adapters import Adapter, Freeze, Full
from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.backbones.quantisation import Quantisation
from residency.backbones.seq2seq import Seq2Seq
from residency.core.errors import UserError
from residency.engine.rank_strategy import RankStrategy, stage_strategy
from residency.engine.sharding import check_observers, check_shardable
from residency.mitigations import EWC, Replay
from residency.objectives import KTO, RLOO, SFT
from residency.objectives.rewards import ByRewardModel
from table import ADAPTERS, MITIGATIONS, OBJECTIVES

PARTS: dict[str, Any] = {
    "backbone": CausalLM(path="somewhere"),
    "adapter": lora(r=2),
    "mitigations": {"ewc": EWC(strength=1.0), "replay": Replay()},
    "objective": SFT(),
}
OTHERS = {
    "quantised": ({"backbone": CausalLM(path="somewhere", quantisation=Quantisation())}, "model.backbone (CausalLM)"),
    "encoder-decoder": ({"backbone": Seq2Seq(path="somewhere")}, "model.backbone (Seq2Seq)"),
    "galore": ({"adapter": ADAPTERS["galore"].make()}, "model.adapter (GaLore)"),
    "gradients of what trains": ({"adapter": Full()}, "model.mitigations.ewc (EWC)"),
    "virtual steps of what trains": (
        {"adapter": Full(), "mitigations": {"mine": Replay(draw="mir")}},
        "model.mitigations.mine (Replay)",
    ),
    "dora": ({"adapter": lora(r=2, use_dora=True)}, "model.adapter (Peft)"),
    "intruders": (
        {"mitigations": {"mine": MITIGATIONS["intruder_reduction"].make()}},
        "model.mitigations.mine (IntruderReduction)",
    ),
    "shielding": (
        {"mitigations": {"mine": MITIGATIONS["source_shielding"].make()}},
        "model.mitigations.mine (SourceShielding)",
    ),
    "rows asked about later": (
        {"objective": OBJECTIVES["preference_pretrained"].make()},
        "model.objective (Preference)",
    ),
    "the weights of a reward model": (
        {"adapter": Full(), "mitigations": {}, "objective": RLOO(reward=ByRewardModel(stage=1))},
        "model.objective (RLOO)",
    ),
    "the start of a stage": (
        {"adapter": Full(), "mitigations": {}, "objective": KTO(baseline="batch")},
        "model.objective (KTO)",
    ),
}


def test_lora_with_replay_and_ewc_takes_part() -> None:
    check_shardable(**PARTS)


@pytest.mark.parametrize("name", OTHERS)
def test_who_does_not_is_named_with_what_to_do(name: str) -> None:
    parts, told = OTHERS[name]
    with pytest.raises(UserError) as error:
        check_shardable(**PARTS | parts)
    assert str(error.value).startswith(f"{told} with trainer.strategy ModelParallelStrategy")
    assert "strategy to ddp" in error.value.fix


@pytest.mark.parametrize("adapter", [Full(), Freeze(bottom=1)])
def test_full_fine_tuning_with_replay_takes_part(adapter: Adapter) -> None:
    check_shardable(**PARTS | {"adapter": adapter, "mitigations": {"replay": Replay()}})


def test_who_is_derived_from_replay_or_full_says_so_itself() -> None:
    class Own(Replay):
        shardable = True

    class OwnFull(Full):
        pass

    with pytest.raises(UserError, match=r"mine \(Own\)[^?]*gradients of what trains"):
        check_shardable(**PARTS | {"adapter": Full(), "mitigations": {"mine": Own()}})
    with pytest.raises(UserError, match=r"model\.adapter \(OwnFull\)"):
        check_shardable(**PARTS | {"adapter": OwnFull(), "mitigations": {}})


def test_what_is_derived_from_a_part_says_so_itself() -> None:
    class Derived(EWC):
        pass

    with pytest.raises(UserError, match=r"Derived"):
        check_shardable(**PARTS | {"mitigations": {"mine": Derived(strength=1.0)}})
    for row in MITIGATIONS.values():
        if (mine := row.make()).shardable:
            check_shardable(**PARTS | {"mitigations": {"mine": mine}})
    for made in (row.make() for row in OBJECTIVES.values()):
        if made.shardable:
            check_shardable(**PARTS | {"objective": made})


def test_nobody_looks_inside_on_one_rank() -> None:
    check_observers({})
    with pytest.raises(UserError, match=r"inspection\.drift"):
        check_observers({"drift": object()})


@pytest.mark.parametrize("options", [{}, {"tensor_parallel_size": 1}])
def test_the_strategy_is_ours(options: Any) -> None:
    found = stage_strategy(ModelParallelStrategy(**options))
    assert isinstance(found, RankStrategy)
    assert found.shards


@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"data_parallel_size": 2}])
def test_products_are_not_cut(options: Any) -> None:
    with pytest.raises(UserError, match=r"fsdp\.yaml"):
        stage_strategy(ModelParallelStrategy(**options))
