"""Stages that differ: in fit, in a study, over a kill, in the keys; refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from residency.adapters import Full
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree
from residency.engine.schedules import StageSchedule
from residency.engine.stage_overrides import StageOverrides
from residency.objectives import DFT, Preference
from residency.runs.cli import parse
from residency.runs.keys import RunKeys
from residency.runs.stream import open_stage_cache
from residency.testing.tiny_runs import train
from support.cli import call, read_json, tiny_config, write_yaml
from support.same_run import assert_equal_trees, assert_same_run
from support.stop_and_resume import goes_on_exactly
from support.tiny_sweeps import REPLAY, run_sweep, write_study
from table import MITIGATIONS

KINDS = {"a": "generative", "b": "label"}


def test_a_stage_follows_its_own_settings(llama: Path, tmp_path: Path) -> None:
    """Epochs, steps, batch, rate, schedule and objective of the second stage, none of them of the first."""
    own = {"b": StageOverrides(epochs=2, batch_size=3, lr=1e-3, scheduler=StageSchedule, objective=DFT())}
    plain, _ = train(tmp_path / "plain", llama, Full(), kinds=KINDS)
    record, module = train(tmp_path / "own", llama, Full(), kinds=KINDS, stages=own)
    lines = [json.loads(line) for line in (tmp_path / "own" / "history.jsonl").read_text().splitlines()]
    rows = len(module.dataset)
    assert sum(line["stage"] == 2 for line in lines) == 2 * -(-24 // 3) == rows // 3
    assert type(module.objective) is DFT
    assert record["scores"]["nll"]["R"][1] == plain["scores"]["nll"]["R"][1]
    assert record["scores"]["nll"]["R"][2] != plain["scores"]["nll"]["R"][2]
    first = [load_tree(next((tmp_path / n).glob("stages/1-*/state.safetensors")))["weights"] for n in ("plain", "own")]
    assert_equal_trees(*first, "the first stage")


def test_settings_of_all_stages_are_those_of_a_run(llama: Path, tmp_path: Path) -> None:
    """Bit for bit: what is said stage by stage is what the same run says once."""
    base = tiny_config(tmp_path / "data", llama)
    slow = {"lr": 0.001, "batch_size": 2, "steps": 4, "scheduler": "linear", "objective": "dft"}
    stages = write_yaml(tmp_path / "stages.yaml", {**base, "stages": {"a": slow, "b": slow}})
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}}
    model = {**base["model"], "optimizer": optimizer, "scheduler": "linear", "objective": "dft"}
    data, trainer = {**base["data"], "batch_size": 2}, {**base["trainer"], "max_steps": 4}
    once = write_yaml(tmp_path / "once.yaml", {**base, "model": model, "data": data, "trainer": trainer})
    for name, file in (("stages", stages), ("once", once)):
        found = call("fit", "--config", file, "--run_dir", tmp_path / name, "--store", tmp_path / "store" / name)
        assert found.code == 0, found.err
        told = "a: 4 steps of 2 rows (lr 0.001, scheduler StageSchedule, objective DFT)"
        assert (told in found.out) == (name == "stages")
    assert_same_run(tmp_path / "stages", tmp_path / "once")
    assert keys_of(stages, tmp_path).stages == keys_of(once, tmp_path).stages


def keys_of(config: Path, folder: Path, *words: str) -> RunKeys:
    cli = parse(["fit", "--config", str(config), f"--store={folder / 'store'}", *words])
    parts: dict[str, Any] = {"module": cli.model, "data": cli.datamodule, "trainers": cli.trainers}
    return open_stage_cache(**parts, settings=cli.settings, config=cli.resolved).keys


@pytest.mark.parametrize(
    "word", ["lr=0.5", "epochs=7", "steps=9", "batch_size=2", "objective=dft", "scheduler=cosine", "objective=DFT"]
)
def test_a_setting_is_part_of_its_stage_and_of_what_follows_it(word: str, llama: Path, tmp_path: Path) -> None:
    base = write_yaml(tmp_path / "base.yaml", tiny_config(tmp_path / "data", llama))
    plain = keys_of(base, tmp_path).stages
    name, value = word.split("=")
    second = keys_of(base, tmp_path, f"--stages.b.{name}", value).stages
    assert second[0] == plain[0]
    assert second[1].trained != plain[1].trained
    first = keys_of(base, tmp_path, f"--stages.a.{name}", value).stages
    assert first[0].trained != plain[0].trained
    assert first[1].trained != plain[1].trained


def test_a_stage_that_says_what_the_run_says_is_shared(llama: Path, tmp_path: Path) -> None:
    base = write_yaml(tmp_path / "base.yaml", tiny_config(tmp_path / "data", llama))
    same = keys_of(base, tmp_path, "--stages.b.lr=0.02", "--stages.b.steps=3", "--stages.b.batch_size=4").stages
    assert same == keys_of(base, tmp_path).stages


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stages.c.epochs=2"], "stages names c"),
        (["--stages.a.epoch=2"], "epoch"),
        (["--stages.b.batch_size=3", "--data.micro_batch_size=2"], "stages.b: data.batch_size=3"),
        (["--stages.b.lr=1e40"], "stages.b: model.optimizer"),
        (["--stages.b.objective=dpo", "--model.mitigations.replay=replay"], "model.mitigations.replay"),
        (["--stages.b.objective=lora"], "stages"),
        (["--stages.a.batch_size=1000000000"], "batch_size of 1,000,000,000"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    words: list[str], said: str, llama: Path, tmp_path: Path
) -> None:
    base = write_yaml(tmp_path / "base.yaml", tiny_config(tmp_path / "data", llama))
    found = call("fit", "--config", base, "--run_dir", tmp_path / "run", *words)
    assert found.code == 2
    assert said in found.err
    assert "why" in found.err
    assert "fix" in found.err
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_rows_are_not_kept_for_an_objective_that_cannot_read_them(llama: Path, tmp_path: Path) -> None:
    own = {"b": StageOverrides(objective=Preference())}
    for name in ("replay", "der", "agem", "gem"):
        parts = {name: MITIGATIONS[name].make()}
        with pytest.raises(UserError, match="reads completion rows, and b, whose objective reads pair rows"):
            train(tmp_path / name, llama, Full(), parts, kinds=KINDS, stages=own)


def test_a_stage_with_its_own_settings_goes_on_exactly(llama: Path, tmp_path: Path) -> None:
    own = {"b": StageOverrides(steps=6, batch_size=2, lr=3e-3, scheduler=StageSchedule, objective=DFT())}
    goes_on_exactly(tmp_path, llama, Full, lambda: {"replay": MITIGATIONS["replay"].make()}, stages=own)


@pytest.mark.slow
def test_a_study_crosses_the_settings_of_a_stage(llama: Path, tmp_path: Path) -> None:
    """An axis over the epochs of the second domain shares the first stage; the joint reference sees as many rows."""
    axes = {"length": {"short": {"stages.b.steps": 1}, "long": {"stages.b.epochs": 1, "stages.b.batch_size": 2}}}
    axes["mitigation"] = {"none": {}, "replay": REPLAY}
    study = write_study(
        tmp_path, llama, steps=2, domains="abc", axes=axes, references=["joint"], scorer="nll", seeds=[0]
    )
    code, out = run_sweep(study, tmp_path / "study", dry_run=True)
    assert code == 0
    assert "b: 1 steps of 4 rows" in out
    assert "b: 12 steps of 2 rows (epochs 1)" in out
    code, out = run_sweep(study, tmp_path / "study")
    assert code == 0, out
    found = {p.parent.name: read_json(p) for p in (tmp_path / "study").glob("cells/*/results.json")}
    rows = {name: record["scores"]["nll"]["R"] for name, record in found.items()}
    assert rows["short-none-s0"][1] == rows["long-none-s0"][1]
    assert rows["short-none-s0"][2] != rows["long-none-s0"][2]
    steps = {
        name: len((tmp_path / "study" / "cells" / name / "history.jsonl").read_text().splitlines()) for name in found
    }
    assert steps["short-none-s0"] == 2 + 1 + 2
    assert steps["long-none-s0"] == 2 + 12 + 2
    joint = {name: count for name, count in steps.items() if name.startswith("joint")}
    assert sorted(joint.values()) == [round(4 * 5 / 4), round((8 + 24 + 8) / 4)]


def test_a_joint_reference_has_one_objective(llama: Path, tmp_path: Path) -> None:
    axes = {"objective": {"dft": {"stages.b.objective": "dft"}}}
    study = write_study(tmp_path, llama, axes=axes, references=["joint"], scorer="nll", seeds=[0])
    with pytest.raises(UserError, match=r"references: joint, and stages\.b\.objective"):
        run_sweep(study, tmp_path / "study", dry_run=True)
