"""Every pass counts: tokens and FLOPs of a stage against torch's own counter, whoever asks for the pass."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from residency.adapters import Full
from residency.adapters.base import Adapter
from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.types import Stage
from residency.domains.stream_data import StreamData
from residency.engine.checkpointing import History
from residency.engine.module import ContinualModule
from residency.engine.stage import finish_stage, train_stage
from residency.mitigations import Mitigation
from residency.objectives import SFT
from residency.testing.fit_without_trainer import Fits
from residency.testing.tiny_models import write_backbone
from residency.testing.tiny_runs import domains
from support.counted import counter
from table import MITIGATIONS

CPU = torch.device("cpu")
ADAPTERS: Mapping[str, Any] = {"full": Full, "lora": partial(lora, target_modules="all-linear", r=2, lora_alpha=4)}
SOME = ("ewc", "gem", "der", "self_distillation")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"), layers=4)


def two_stages(
    folder: Path,
    backbone: Path,
    adapter: Adapter,
    parts: Mapping[str, Mitigation],
    *,
    layout: str = "packed",
    stages: str = "ab",
    **loading: Any,
) -> tuple[dict[str, int], int]:
    """What the record says of two stages with what follows them, and what torch has counted."""
    module = ContinualModule(
        backbone=CausalLM(path=str(backbone), **loading),
        adapter=adapter,
        objective=SFT(),
        mitigations=dict(parts),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        layout=layout,  # type: ignore[arg-type]
    )
    module.build(seed=0)
    data = StreamData(domains=domains(folder / "data", {"a": "generative", "b": "label"}), batch_size=4)
    told: dict[str, int] = {}
    with counter() as counted:
        for index, domain in enumerate(stages):
            stage = Stage(index=index, domain=domain, stages=3, seed=0, steps=3, batch_size=4)
            facts = train_stage(
                module=module,
                data=data,
                trainers=Fits(lambda: {}),
                stage=stage,
                folder=folder / "work",
                history=History(stage=stage, every_n_steps=1, offset=0, write=lambda line: None),
                observers=[],
                checkpoint_every_n_steps=0,
            )
            facts = finish_stage(module, facts, device=CPU)["facts"]
            for name in ("train_tokens", "finish_tokens", "batch_tokens", "train_flops", "finish_flops"):
                told[name] = told.get(name, 0) + facts[name]
    return told, counted.get_total_flops()


def share(told: Mapping[str, int], counted: int) -> float:
    return (told["train_flops"] + told["finish_flops"]) / counted


@pytest.mark.parametrize(
    ("mitigation", "adapter"),
    [
        pytest.param(m, a, marks=pytest.mark.pairs if a == "full" and m in SOME[1:] else ())
        for m in ("", *SOME)
        for a in ADAPTERS
    ],
)
def test_counted_flops_are_torchs(mitigation: str, adapter: str, backbone: Path, tmp_path: Path) -> None:
    parts = {"x": MITIGATIONS[mitigation].make()} if mitigation else {}
    told, counted = two_stages(tmp_path, backbone, ADAPTERS[adapter](), parts)
    assert share(told, counted) == pytest.approx(1, abs=0.05)
    extra = told["train_tokens"] + told["finish_tokens"] - told["batch_tokens"]
    assert extra > 0 if mitigation else extra == 0


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_computed_again_counts(adapter: str, layout: str, backbone: Path, tmp_path: Path) -> None:
    """Gradient checkpointing: the same tokens, more FLOPs."""
    found = {}
    for again in (False, True):
        options = {"layout": layout, "gradient_checkpointing": again}
        told, counted = two_stages(tmp_path / str(again), backbone, ADAPTERS[adapter](), {}, **options)
        assert share(told, counted) == pytest.approx(1, abs=0.05)
        found[again] = told
    assert found[True]["train_tokens"] == found[False]["train_tokens"] == found[True]["batch_tokens"]
    assert found[True]["train_flops"] > 1.2 * found[False]["train_flops"]


def test_a_teacher_reads_what_the_student_reads(backbone: Path, tmp_path: Path) -> None:
    parts = {"x": MITIGATIONS["self_distillation"].make()}
    both, _ = two_stages(tmp_path / "taught", backbone, ADAPTERS["lora"](), parts)
    first, _ = two_stages(tmp_path / "first", backbone, ADAPTERS["lora"](), {}, stages="a")
    assert both["train_tokens"] - both["batch_tokens"] == both["batch_tokens"] - first["batch_tokens"]


# What these do with weights alone is more than the rest on a tiny model with some hundred tokens: products of factors,
# 2 r per number of a layer and state, where a token is 6.
_WITH_WEIGHTS_ALONE = {"dare", "slerp", "ties", "magmax"}


# Statistics of activations, a loss in front of the head, and answers of unequal lengths.
_ALWAYS = ("gpm", "ewc_kfac", "mas", "generative_replay")


@pytest.mark.parametrize(
    "mitigation",
    [
        pytest.param(name, marks=() if name in _ALWAYS else pytest.mark.pairs)
        for name in MITIGATIONS
        if name not in SOME
    ],
)
def test_every_mitigation_counts_its_passes(mitigation: str, backbone: Path, tmp_path: Path) -> None:
    told, counted = two_stages(tmp_path, backbone, ADAPTERS["lora"](), {"x": MITIGATIONS[mitigation].make()})
    assert (0.7 if mitigation in _WITH_WEIGHTS_ALONE else 0.95) < share(told, counted) < 1.05
