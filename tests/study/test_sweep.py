"""A study is run, goes on, reports what failed, and shares what its cells have in common."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import residency
from residency.runs.config.sources import read_yaml
from residency.study import command
from residency.study.executors import Outcome, Task
from support.cli import Result, call, read_json, tiny_config, write_yaml
from support.tiny_sweeps import Inline

REPLAY = {"class_path": "residency.mitigations.Replay", "init_args": {"ratio": 0.5, "capacity": 8}}


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base config, a preset and two studies: none and replay; the same with a cell that cannot be trained."""
    folder = tmp_path_factory.mktemp("study")
    base = tiny_config(folder / "data", llama)
    base["trainer"]["max_steps"] = 2
    write_yaml(folder / "base.yaml", base)
    write_yaml(folder / "replay.yaml", REPLAY)
    mitigation: dict[str, Any] = {"none": {}, "replay": {"model.mitigations.old": "replay.yaml"}}
    study = {"name": "tiny", "base": "base.yaml", "axes": {"mitigation": mitigation}}
    write_yaml(folder / "study.yaml", study)
    mitigation["broken"] = {"model.adapter.config.target_modules": ["nope"]}
    write_yaml(folder / "broken.yaml", study)
    return folder


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the tasks that ran, without the price of a process."""
    tasks: list[str] = []

    def inline(*args: Any) -> Inline:
        executor = Inline()
        executor.ran = tasks
        return executor

    monkeypatch.setattr(command, "_local", inline)
    return tasks


def sweep(folder: Path, study: str = "study.yaml", *words: str, into: str = "out") -> Result:
    """Call the command."""
    return call("sweep", folder / study, "--study_dir", folder / into, "--workers=1", "--threads=1", *words)


def test_a_sweep(folder: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    result = sweep(folder)
    assert result.code == 0, result.out + result.err
    assert len(ran) == 1 + 2 + 2 + 2, "row 0; what replay remembers; its second stage; two records"
    cells = {name: folder / "out" / "cells" / f"{name}-s0" for name in ("none", "replay")}
    records = {name: read_json(cell / "results.json") for name, cell in cells.items()}
    assert {name: record["axes"] for name, record in records.items()} == {n: {"mitigation": n} for n in cells}
    assert "replay" in result.out
    assert "baseline" in result.out
    plan = read_json(folder / "out" / "plan.json")
    assert [cell["id"] for cell in plan["cells"]] == ["none-s0", "replay-s0"]
    assert read_yaml(folder / "out" / "study.yaml", what="the study") == plan["study"]
    assert {"index.html", "nll.png", "nll.svg"} <= {path.name for path in (folder / "out" / "report").iterdir()}

    rows = [[record["scores"]["nll"]["R"][k] for record in records.values()] for k in range(3)]
    assert rows[0][0] == rows[0][1]
    assert rows[1][0] == rows[1][1], "replay has nothing to replay in the first stage"
    assert rows[2][0] != rows[2][1]

    # The second sweep runs nothing and tells the same.
    ran.clear()
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*.json")}
    again = sweep(folder)
    assert again.code == 0
    assert ran == []
    assert "0 to run, 2 complete" in again.out
    assert {path: path.read_bytes() for path in (folder / "out").rglob("*.json")} == before
    assert again.out.splitlines()[-8:] == result.out.splitlines()[-8:]

    # So does one by the name of a preset, from wherever it is called.
    (folder / "studies").mkdir()
    (folder / "studies" / "by_name.yaml").symlink_to(folder / "study.yaml")
    monkeypatch.setenv("RESIDENCY_PRESETS", str(folder))
    named = call("sweep", "by_name", "--study_dir", folder / "out", "--workers=1", "--threads=1")
    assert (named.code, named.out, ran) == (0, again.out, []), named.err
    unknown = call("sweep", "by_nam", "--study_dir", folder / "out")
    assert unknown.code == 2
    assert "did you mean 'by_name'?" in unknown.err

    found = residency.sweep(folder / "study.yaml", study_dir=folder / "out")
    assert list(found.runs) == ["none-s0", "replay-s0"]
    assert set(found.summary["status"]) == {"done"}
    assert set(found.summary["mitigation"]) == {"none", "replay"}


def test_a_cell_that_fails(folder: Path, ran: list[str]) -> None:
    result = sweep(folder, "broken.yaml", into="broken")
    assert result.code == 3
    told = " ".join(result.out.split())
    assert "failed (exit code 2)" in told
    assert "1 of 3 cells failed: broken-s0" in told
    assert "PEFT refuses" in told
    assert "  fix: " in result.out
    done = [(folder / "broken" / "cells" / f"{n}-s0" / "results.json").exists() for n in ("none", "replay", "broken")]
    assert done == [True, True, False]
    found = residency.load_study(folder / "broken")
    assert list(found.runs) == ["none-s0", "replay-s0"]
    assert found.summary.row(-1, named=True)["status"] == "missing"

    # The same command tries the failed cell alone, and what it did not get to is not tried.
    ran.clear()
    assert sweep(folder, "broken.yaml", into="broken").code == 3
    assert len(ran) == 2, "row 0 with its adapter, and its first stage"


def test_all_cells_fail(folder: Path, ran: list[str]) -> None:
    study = yaml.safe_load((folder / "broken.yaml").read_text())
    study["axes"]["mitigation"] = {"broken": study["axes"]["mitigation"]["broken"]}
    write_yaml(folder / "all.yaml", study)
    result = sweep(folder, "all.yaml", into="all")
    assert result.code == 2
    assert "1 of 1 cells failed" in result.out


def test_a_dry_run_checks_and_writes_nothing(folder: Path, ran: list[str]) -> None:
    result = sweep(folder, "study.yaml", "--dry-run", into="dry")
    assert result.code == 0
    assert "2 to run" in result.out
    assert "time and disk: unknown" in result.out
    assert not (folder / "dry").exists()
    assert ran == []


def test_workers_take_their_threads_and_the_process_keeps_its_own(folder: Path, ran: list[str]) -> None:
    before = torch.get_num_threads()
    result = sweep(folder, "study.yaml", "--dry-run", f"--threads={before + 1}", into="dry")
    assert f"threads of each: {before + 1}" in result.out
    assert torch.get_num_threads() == before


def test_a_plan_can_measure_what_it_will_take(folder: Path, ran: list[str]) -> None:
    result = sweep(folder, "study.yaml", "--measure", into="dry")
    assert result.code == 0
    assert re.search(r"time: about \d+ (min \d\d )?s; disk: about \d+ MiB", result.out)
    assert not (folder / "dry").exists()
    assert ran == []


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"model.mitigations.old.ratio": 2}, ("cell wrong-s0: ",)),
        ({"model.mitigation.old": "replay.yaml"}, ("cell wrong-s0: --model.mitigation.old", "no key")),
        ({"model.mitigations.ewc": {"class_path": "EWC"}, "model.adapter": "bare.yaml"}, ("fixed_coordinates",)),
        ({"data.domains.a.train": "nope.jsonl"}, ("cell wrong-s0: data.domains.a.train file 'nope.jsonl'",)),
    ],
)
def test_mistakes_in_one_cell_stop_all_before_the_first(
    keys: dict[str, Any], parts: tuple[str, ...], folder: Path, ran: list[str]
) -> None:
    write_yaml(folder / "bare.yaml", {"class_path": "support.components.Bare"})
    study = {"name": "tiny", "base": "base.yaml", "axes": {"x": {"right": {}, "wrong": keys}}}
    write_yaml(folder / "wrong.yaml", study)
    result = sweep(folder, "wrong.yaml", into="wrong")
    assert result.code == 2
    for part in parts:
        assert part in result.err
    assert result.err.count("  fix: ") == 1
    assert ran == []
    assert not (folder / "wrong").exists()


def test_a_scorer_that_no_domain_has(folder: Path, ran: list[str]) -> None:
    study = yaml.safe_load((folder / "study.yaml").read_text())
    study |= {"scorer": "accuracy", "axes": {"x": {"text": {"data.order": ["a"]}}}}
    result = sweep(write_yaml(folder / "scorer.yaml", study).parent, "scorer.yaml", into="scorer")
    assert result.code == 2
    assert "accuracy" in result.err
    assert "exact_match, nll, rougeL" in result.err
    assert ran == []


def test_a_study_that_is_not_there(folder: Path) -> None:
    result = sweep(folder, "nope.yaml")
    assert (result.code, result.out) == (2, "")
    assert "nope.yaml: No such file" in result.err


def test_a_signal_to_a_task_stops_the_study(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops(Inline):
        def submit(self, task: Task) -> None:
            self.outcomes.append(Outcome(task_id=task.id, exit_code=75))

    monkeypatch.setattr(command, "_local", lambda *args: Stops())
    result = sweep(folder, into="stopped")
    assert result.code == 75
    expected = (
        "residency: stopped by a signal to one of its tasks; what is complete is kept, the same command goes on\n"
    )
    assert result.err == expected


@pytest.mark.parametrize("word", ["--workers=0", "--threads=-1"])
def test_numbers_that_cannot_be(word: str, folder: Path) -> None:
    result = call("sweep", folder / "study.yaml", word)
    assert result.code == 2
    assert word in result.err
