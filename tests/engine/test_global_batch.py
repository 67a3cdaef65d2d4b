"""One normaliser per step: how a batch is cut into micro-batches changes no gradient and no weight."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from residency.adapters.peft import lora
from residency.core.errors import UserError
from residency.core.types import Layout
from residency.domains.jsonl import Jsonl
from residency.domains.template import Template
from residency.engine.trainers import Trainers
from residency.testing.tiny_runs import train
from support.cuts import BATCH, STAGES, Cuts, assert_same
from table import MITIGATIONS

# Every mitigation in both layouts; the other sizes come with `make test-pairs`.
SIZES: dict[Layout, tuple[int, ...]] = {"packed": (1,), "padded": (2,)}
OTHER_SIZES: dict[Layout, tuple[int, ...]] = {"packed": (2, 4), "padded": (1, 4)}


# Most are cut in float64 in `test_micro_batches.py`, too; in float32 the others come with the pairs.
SOME = ("ewc", "gpm", "replay", "der", "mas", "gem", "migu", "self_distillation", "weight_mixing", "sdft", "ema", "si")


@pytest.mark.parametrize(
    "mitigation", ["", *(pytest.param(n, marks=() if n in SOME else pytest.mark.pairs) for n in MITIGATIONS)]
)
def test_micro_batches_change_no_gradient(mitigation: str, llama: Path, tmp_path: Path) -> None:
    _assert_no_change(mitigation, SIZES, llama, tmp_path)


@pytest.mark.pairs
@pytest.mark.parametrize("mitigation", ["", *MITIGATIONS])
def test_micro_batches_of_other_sizes_change_none(mitigation: str, llama: Path, tmp_path: Path) -> None:
    _assert_no_change(mitigation, OTHER_SIZES, llama, tmp_path)


def _assert_no_change(mitigation: str, sizes: Mapping[Layout, tuple[int, ...]], llama: Path, folder: Path) -> None:
    """Every size against the whole batch in the same layout, all after one first stage."""
    cuts = Cuts(llama, folder, mitigation=MITIGATIONS[mitigation].make if mitigation else None)
    for layout in sizes:
        gradients, weights = cuts.second(BATCH, layout)
        assert len(gradients) == STAGES[1].steps
        for micro in sizes[layout]:
            found, after = cuts.second(micro, layout)
            how = f"in {layout} micro-batches of {micro}"
            for step, (one, other) in enumerate(zip(gradients, found, strict=True), 1):
                assert_same(one, other, f"gradients of step {step} {how}")
            assert_same(weights, after, f"weights {how}")


def _uneven(folder: Path) -> dict[str, str]:
    paths = {}
    for split, first in (("train", 10), ("test", 50)):
        rows = [{"prompt": f"{first + i}", "completion": "ab" if i % 2 else "abcdefgh" * 5} for i in range(16)]
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths[split] = str(path)
    return paths


def test_thirty_steps_of_adamw_learn_the_same(llama: Path, tmp_path: Path) -> None:
    """Completions of 3 and 41 tokens: a mean of means weighs a token of a short one up to 13 times as much."""
    template = Template(prompt="{prompt}>", completion="{completion}", max_prompt_tokens=8, max_tokens=64)
    reader = Jsonl(**_uneven(tmp_path), template=template, scorers=["nll"])
    scores = []
    for micro in (8, 1):
        data = {"domains": {"a": reader}, "batch_size": 8, "micro_batch_size": micro}
        record, _ = train(tmp_path / str(micro), llama, lora(target_modules="all-linear", r=2), data=data, steps=30)
        scores.append(record["scores"]["nll"]["R"][1][0])
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


OVERWRITTEN = {
    "accumulate_grad_batches": (4, "data.micro_batch_size"),
    "limit_train_batches": (0.5, "trainer.max_steps"),
    "max_time": ("00:00:10:00", "trainer.max_epochs"),
    "fast_dev_run": (True, "trainer.max_steps"),
    "enable_checkpointing": (True, "checkpoint_every_n_steps"),
    "default_root_dir": ("elsewhere", "--run_dir"),
    "num_sanity_val_steps": (2, "evaluation"),
    "check_val_every_n_epoch": (3, "evaluation"),
    "overfit_batches": (2, "max_train"),
}


@pytest.mark.parametrize("option", OVERWRITTEN)
def test_what_a_stream_overwrites_is_refused(option: str) -> None:
    value, instead = OVERWRITTEN[option]
    with pytest.raises(UserError) as error:
        _ = Trainers(lambda: {"accelerator": "cpu", option: value}).world_size
    assert f"trainer.{option}={value}" in str(error.value)
    assert instead in str(error.value)


def test_the_trainers_defaults_are_no_request() -> None:
    """A resolved config names every option."""
    defaults = {name: p.default for name, p in inspect.signature(Trainer.__init__).parameters.items() if name != "self"}
    assert Trainers(lambda: {**defaults, "accelerator": "cpu", "devices": 1}).world_size == 1


@pytest.mark.parametrize("options", [{"accelerator": "\u2028"}, {"accelerator": "cpu", "devices": -3}])
def test_what_lightning_refuses_is_told_whoever_asks_first(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"(?s)trainer.*fix: correct trainer\.accelerator"):
        _ = Trainers(lambda: dict(options)).world_size
