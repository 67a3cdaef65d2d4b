"""W&B of a study that was killed and goes on, read back from its files: one run per cell, and its report."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from residency.runs.folder import RunFolder
from support.killed_sweep import in_child
from support.tiny_sweeps import EWC, run_sweep, write_study
from support.wandb_logs import runs, series, temporary_home

pytestmark = pytest.mark.slow
STEPS = 3


@pytest.fixture(scope="module")
def killed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two cells that share their first stage; killed in mid-stage, then carried on to its end."""
    folder = tmp_path_factory.mktemp("tracked")
    path = write_study(folder, llama, steps=STEPS, domains="ab", axes={"mitigation": {"none": {}, "ewc": EWC(1.0)}})
    with pytest.MonkeyPatch.context() as patch:
        temporary_home(patch, folder / "home")
        process = in_child(path, folder / "study", at=60, wandb="offline")
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
        assert not all(_complete(folder / "study"))
        code, out = run_sweep(path, folder / "study")
        assert code == 0, out
        runs(folder)  # its service ends before the environment is what it was
    return folder / "study"


def _complete(study: Path) -> list[bool]:
    return [RunFolder(cell).results() is not None for cell in sorted((study / "cells").iterdir())]


@pytest.fixture(scope="module")
def found(killed: Path) -> dict[str, list[Any]]:
    """{name of the W&B run: its fragments}."""
    return {parts[0].run.display_name: parts for parts in runs(killed).values()}


def test_one_run_per_cell_and_one_of_the_report(killed: Path, found: dict[str, list[Any]]) -> None:
    assert {*found} == {"none-s0", "ewc-s0", "tiny report"}
    assert len(runs(killed)) == 3, "no other run, whatever number of processes wrote"
    assert len(found["none-s0"]) > 2, "stages tell by themselves"
    kinds = {name: {part.run.job_type for part in parts} for name, parts in found.items()}
    assert kinds == {"none-s0": {"train"}, "ewc-s0": {"train"}, "tiny report": {"report"}}
    for name, parts in found.items():
        for part in parts:
            assert part.run.project == "tiny"
            assert part.run.run_group == {"none-s0": "tiny: none", "ewc-s0": "tiny: ewc"}.get(name, "tiny")
            assert "tiny" in part.run.tags
    assert found["none-s0"][-1].exit_code == 0


@pytest.mark.parametrize("cell", ["none-s0", "ewc-s0"])
def test_every_step_once_at_its_own_time(killed: Path, found: dict[str, list[Any]], cell: str) -> None:
    history = RunFolder(killed / "cells" / cell).history()
    wanted = {line["stream_step"]: (line["loss"], line["time"]) for line in history}
    told = [
        (line["stream/step"], line["train/loss"], time)
        for part in found[cell]
        for line, time in zip(part.history, part.times, strict=True)
        if "train/loss" in line
    ]
    assert sorted(step for step, _, _ in told) == [*range(1, 2 * STEPS + 1)]
    for step, loss, _ in told:
        assert loss == pytest.approx(wanted[step][0]), step
    # A step that was told and then run again after the kill has the time at which it ran first.
    assert all(time <= wanted[step][1] + 1e-6 for step, _, time in told)


def test_steps_are_told_while_the_study_runs(found: dict[str, list[Any]]) -> None:
    """The first cell's steps are in fragments that began before their stage was trained to its end."""
    for part in found["none-s0"]:
        steps = [time for line, time in zip(part.history, part.times, strict=True) if "train/loss" in line]
        assert all(time >= part.started for time in steps), "told late"


@pytest.mark.parametrize("cell", ["none-s0", "ewc-s0"])
def test_rows_of_scores_are_those_of_the_record(killed: Path, found: dict[str, list[Any]], cell: str) -> None:
    record = json.loads((killed / "cells" / cell / "results.json").read_text())
    for column, domain in enumerate(record["domains"]):
        rows = sorted(series(found[cell], f"eval/{domain}/nll", "stream/domain"))
        assert rows == [(k, pytest.approx(row[column])) for k, row in enumerate(record["scores"]["nll"]["R"])]


@pytest.mark.parametrize("cell", ["none-s0", "ewc-s0"])
def test_weights_and_data_are_artifacts(found: dict[str, list[Any]], cell: str) -> None:
    artifacts = [artifact for part in found[cell] for artifact in part.artifacts]
    assert {a.name for a in artifacts if a.use_after_commit} == {"tiny-data-a", "tiny-data-b"}
    stages = [json.loads(a.metadata)["stage"] for a in artifacts if a.type == "adapter"]
    assert stages == [1, 2]
    for artifact in (a for a in artifacts if a.type == "adapter"):
        assert all(Path(file.local_path).is_file() for file in artifact.manifest.contents)


def test_a_sweep_of_a_finished_study_tells_nothing_more(
    killed: Path, found: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    temporary_home(monkeypatch, tmp_path)
    code, out = run_sweep(killed.parent / "study.yaml", killed)
    assert code == 0, out
    again = {parts[0].run.display_name: parts for parts in runs(killed).values()}
    assert {name: len(parts) for name, parts in again.items() if name != "tiny report"} == {
        name: len(parts) for name, parts in found.items() if name != "tiny report"
    }
    assert len(runs(killed)) == 3
