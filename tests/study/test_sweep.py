"""A study is run, goes on, reports what failed, and shares what its cells have in common."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import residency
from command import Result, call, read_json, tiny_config, write_yaml
from residency.study import command
from residency.written import read_yaml

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


class InProcess:
    """Stands for a child process: the command is called here, and counted."""

    started: list[str] = []  # noqa: RUF012 (cleared by the fixture)

    def __init__(self, words: list[str], **options: Any) -> None:
        self.started.append(Path(words[words.index("--run_dir") + 1]).name)
        self.words = words[words.index("residency") + 1 :]

    def wait(self) -> int:
        """The exit code."""
        return call(*self.words).code


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells that were started, without the price of a process."""
    monkeypatch.setattr(command.subprocess, "Popen", InProcess)
    InProcess.started.clear()
    return InProcess.started


def sweep(folder: Path, study: str = "study.yaml", *words: str, into: str = "out") -> Result:
    """Call the command."""
    return call("sweep", folder / study, "--study_dir", folder / into, *words)


def test_a_real_sweep(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    result = sweep(folder)
    assert result.code == 0, capfd.readouterr().err
    cells = {name: folder / "out" / "cells" / f"{name}-s0" for name in ("none", "replay")}
    records = {name: read_json(cell / "results.json") for name, cell in cells.items()}
    assert {name: record["axes"] for name, record in records.items()} == {n: {"mitigation": n} for n in cells}
    assert "replay" in result.out
    assert "baseline" in result.out
    plan = read_json(folder / "out" / "plan.json")
    assert [cell["id"] for cell in plan["cells"]] == ["none-s0", "replay-s0"]
    assert read_yaml(folder / "out" / "study.yaml", what="the study") == plan["study"]
    assert {path.name for path in (folder / "out" / "report").iterdir()} == {"nll.png", "nll.svg"}

    # Row 0 is scored once, the scores after that are each cell's own.
    stages = [read_json(cell / "stages" / "0-base" / "stage.json") for cell in cells.values()]
    assert [stage.get("shared", False) for stage in stages] == [False, True]
    rows = [[record["scores"]["nll"]["R"][k] for record in records.values()] for k in range(3)]
    assert rows[0][0] == rows[0][1]
    assert rows[1][0] == rows[1][1], "replay has nothing to replay in the first stage"
    assert rows[2][0] != rows[2][1]

    # The second sweep runs nothing and tells the same.
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a cell was run again")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*.json")}
    again = sweep(folder)
    assert again.code == 0
    assert "0 to run, 2 complete" in again.out
    assert {path: path.read_bytes() for path in (folder / "out").rglob("*.json")} == before
    assert again.out.splitlines()[-8:] == result.out.splitlines()[-8:]

    found = residency.sweep(folder / "study.yaml", study_dir=folder / "out")
    assert list(found.runs) == ["none-s0", "replay-s0"]
    assert set(found.summary["status"]) == {"done"}
    assert set(found.summary["mitigation"]) == {"none", "replay"}


def test_a_cell_that_fails(folder: Path, started: list[str]) -> None:
    result = sweep(folder, "broken.yaml", into="broken")
    assert result.code == 3
    assert started == ["none-s0", "replay-s0", "broken-s0"]
    assert "failed (exit code 2)" in " ".join(result.out.split())
    assert "1 of 3 cells failed: broken-s0" in result.out
    done = [(folder / "broken" / "cells" / name / "results.json").exists() for name in started]
    assert done == [True, True, False]
    found = residency.load_study(folder / "broken")
    assert list(found.runs) == ["none-s0", "replay-s0"]
    assert found.summary.row(-1, named=True)["status"] == "missing"

    # The same command tries the failed cell alone.
    started.clear()
    assert sweep(folder, "broken.yaml", into="broken").code == 3
    assert started == ["broken-s0"]


def test_all_cells_fail(folder: Path, started: list[str]) -> None:
    study = yaml.safe_load((folder / "broken.yaml").read_text())
    study["axes"]["mitigation"] = {"broken": study["axes"]["mitigation"]["broken"]}
    write_yaml(folder / "all.yaml", study)
    result = sweep(folder, "all.yaml", into="all")
    assert result.code == 2
    assert result.err.count("PEFT refuses") == 0, "the cell has told it already"
    assert "1 of 1 cells failed" in result.out


def test_a_dry_run_checks_and_writes_nothing(folder: Path, started: list[str]) -> None:
    result = sweep(folder, "study.yaml", "--dry-run", into="dry")
    assert result.code == 0
    assert "2 to run" in result.out
    assert not (folder / "dry").exists()
    assert started == []


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"model.mitigations.old.ratio": 2}, ("cell wrong-s0: ",)),
        ({"model.mitigation.old": "replay.yaml"}, ("cell wrong-s0: --model.mitigation.old", "no key")),
        ({"model.mitigations.ewc": {"class_path": "EWC"}, "model.adapter": "bare.yaml"}, ("fixed_coordinates",)),
        ({"data.domains.a.train": "nope.jsonl"}, ("cell wrong-s0: train file 'nope.jsonl'",)),
    ],
)
def test_mistakes_in_one_cell_stop_all_before_the_first(
    keys: dict[str, Any], parts: tuple[str, ...], folder: Path, started: list[str]
) -> None:
    write_yaml(folder / "bare.yaml", {"class_path": "parts.Bare"})
    study = {"name": "tiny", "base": "base.yaml", "axes": {"x": {"right": {}, "wrong": keys}}}
    write_yaml(folder / "wrong.yaml", study)
    result = sweep(folder, "wrong.yaml", into="wrong")
    assert result.code == 2
    for part in parts:
        assert part in result.err
    assert result.err.count("  fix: ") == 1
    assert started == []
    assert not (folder / "wrong").exists()


def test_a_scorer_that_no_domain_has(folder: Path, started: list[str]) -> None:
    study = yaml.safe_load((folder / "study.yaml").read_text())
    study |= {"scorer": "accuracy", "axes": {"x": {"text": {"data.order": ["a"]}}}}
    result = sweep(write_yaml(folder / "scorer.yaml", study).parent, "scorer.yaml", into="scorer")
    assert result.code == 2
    assert "accuracy" in result.err
    assert "exact_match, nll, rougeL" in result.err
    assert started == []


def test_a_study_that_is_not_there(folder: Path) -> None:
    result = sweep(folder, "nope.yaml")
    assert (result.code, result.out) == (2, "")
    assert "nope.yaml: No such file" in result.err


def test_a_signal_to_a_cell_stops_the_study(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops(InProcess):
        def wait(self) -> int:
            return 75

    monkeypatch.setattr(command.subprocess, "Popen", Stops)
    result = sweep(folder, into="stopped")
    assert result.code == 75
    expected = "residency: stopped by a signal to cell none-s0; what is complete is kept, the same command goes on\n"
    assert result.err == expected
