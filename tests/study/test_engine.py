"""A study is a tree of stages: nothing is trained twice, and every cell is what it would be alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from residency.core.tensor_files import load_tree
from residency.runs.stage_runner import StageRunner
from residency.runs.store.store import Store
from residency.study.executors import Executor
from support.cli import read_json
from support.tiny_sweeps import EWC, MIXING, REPLAY, alone, matrices, run_sweep, write_study

AXES: dict[str, Any] = {"mitigation": {"none": {}, "ewc_10": EWC(10.0), "ewc_1000": EWC(1000.0), "mixing": MIXING}}
REFERENCES = ["frozen", "independent", "joint"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(study file, folder of the finished study, what was printed)."""
    folder = tmp_path_factory.mktemp("engine")
    path = write_study(folder, llama, axes=AXES, references=REFERENCES)
    code, out = run_sweep(path, folder / "out")
    assert code == 0, out
    return path, folder / "out", out


def no_executor(logs: Path) -> Executor:
    pytest.fail("nothing was left to run")


def trained(folder: Path) -> set[str]:
    return {key for key, _ in Store(folder / "store").entries("trained")}


def test_every_cell_is_bit_equal_to_its_run_alone(study: tuple[Path, Path, str], tmp_path: Path) -> None:
    _, folder, _ = study
    found = matrices(folder)
    assert len(found) == 4 + 5
    for cell, scores in found.items():
        assert scores == alone(folder, cell, tmp_path), cell
    assert found["ewc_10-s0"] != found["ewc_1000-s0"]
    assert found["none-s0"] != found["mixing-s0"]


def test_a_stream_goes_on_where_another_one_ends(llama: Path, tmp_path: Path) -> None:
    """What is remembered of a domain is estimated for the streams that go on, and for these only."""
    axes = {"mitigation": {"ewc": EWC(10.0), "mixing": MIXING, "both": {**EWC(10.0), **MIXING}}}
    path = write_study(tmp_path, llama, axes=axes, orders=[["a", "b"], ["a", "b", "c"]])
    code, out = run_sweep(path, tmp_path / "out")
    assert code == 0, out
    found = matrices(tmp_path / "out")
    assert len(found) == 6
    for cell, scores in found.items():
        assert scores == alone(tmp_path / "out", cell, tmp_path), cell
    for run in (tmp_path / "out" / "cells" / "ewc-a_b_c-s0", tmp_path / "ewc-a_b_c-s0"):
        after_b, after_c = (load_tree(run / "stages" / k / "state.safetensors")["mitigations"] for k in ("2-b", "3-c"))
        estimates = after_b["ewc"]["precision"]
        assert estimates
        # As the training of c found it, or nothing.
        for name, value in after_c.get("ewc", {}).get("precision", {}).items():
            assert estimates[name].equal(value)


def test_the_plan_says_what_is_trained_and_that_is_trained(study: tuple[Path, Path, str]) -> None:
    _, folder, out = study
    plan = read_json(folder / "plan.json")
    # Alone: 3 stages in 4 cells, one each in 3 independent ones, one joint. Together: the first stage is shared by all,
    # the second by none and mixing; only b alone, c alone and joint are new.
    assert plan["counts"] == {"separate": 16, "trained": (1 + 3 + 4) + 3}
    assert len(trained(folder)) == plan["counts"]["trained"]
    assert "11 different ones (69%) instead of the 16" in out
    assert {key for cell in plan["cells"] for key in cell["stages"]} == trained(folder)


def test_the_folder_of_a_cell_is_a_run(study: tuple[Path, Path, str], tmp_path: Path) -> None:
    _, folder, _ = study
    alone(folder, "ewc_10-s0", tmp_path)
    one, other = tmp_path / "ewc_10-s0", folder / "cells" / "ewc_10-s0"
    names = [sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()) for run in (one, other)]
    assert names[0] == names[1]
    histories = [[json.loads(x) for x in (run / "history.jsonl").read_text().splitlines()] for run in (one, other)]
    timeless = [
        [{k: v for k, v in line.items() if k not in ("seconds", "time")} for line in lines] for lines in histories
    ]
    assert timeless[0] == timeless[1]
    for stage in ("0-base", "1-a", "3-c"):
        frames = [pl.read_parquet(run / "stages" / stage / "scores.parquet") for run in (one, other)]
        assert frames[0].equals(frames[1])


def test_references(study: tuple[Path, Path, str]) -> None:
    _, folder, _ = study
    frozen = read_json(folder / "cells" / "frozen-s0" / "results.json")
    rows = frozen["scores"]["nll"]["R"]
    assert rows == [rows[0]] * 4
    assert frozen["cost"]["train_seconds"] == 0
    joint = read_json(folder / "cells" / "joint-s0" / "results.json")
    assert (joint["domains"], joint["probes"]) == (["joint"], ["a", "b", "c"])
    assert joint["scores"]["nll"]["R"][0][1:] == rows[0]
    lines = (folder / "cells" / "joint-s0" / "history.jsonl").read_text().splitlines()
    assert len(lines) == 6, "as many steps as the three stages of a stream"
    single = read_json(folder / "cells" / "independent_a-s0" / "results.json")
    first = read_json(folder / "cells" / "none-s0" / "results.json")
    assert single["scores"]["nll"]["R"][1][0] == first["scores"]["nll"]["R"][1][0]
    plan = read_json(folder / "plan.json")
    kinds = [cell["reference"] for cell in plan["cells"] if cell["reference"]]
    assert kinds == ["frozen", "independent", "independent", "independent", "joint"]


def test_a_second_sweep_trains_nothing(study: tuple[Path, Path, str]) -> None:
    path, folder, out = study
    before = {p: p.read_bytes() for p in folder.rglob("*.json")}
    code, again = run_sweep(path, folder, no_executor)
    assert code == 0
    assert "0 to run, 9 complete" in again
    assert {p: p.read_bytes() for p in folder.rglob("*.json")} == before
    assert again.splitlines()[-6:] == out.splitlines()[-6:]


def test_one_more_strength_trains_its_own_stages(
    study: tuple[Path, Path, str], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder, _ = study
    runs: list[tuple[str, int]] = []
    original = StageRunner.train

    def counted(self: StageRunner, k: int, **options: Any) -> Any:
        runs.append((self.settings.cell, k))
        return original(self, k, **options)

    monkeypatch.setattr(StageRunner, "train", counted)
    axes = {"mitigation": {"none": {}, "ewc_10": EWC(10.0), "ewc_77": EWC(77.0)}}
    path = write_study(folder.parent, llama, axes=axes)
    # In a study of its own that shares the store, as another project would.
    code, out = run_sweep(path, folder.parent / "more", store=folder / "store")
    assert code == 0
    assert runs == [("ewc_77-s0", 2), ("ewc_77-s0", 3)]
    assert "5 of them need no training any more, 2 will be trained" in out
    found = matrices(folder.parent / "more")
    assert found["ewc_10-s0"] == matrices(folder)["ewc_10-s0"]


def test_the_whole_ablation(llama: Path, tmp_path: Path) -> None:
    """The shape of configs/studies/ablation.yaml, on a tiny model, cell by cell."""
    values = {
        **AXES["mitigation"],
        "replay": REPLAY,
        "ewc_online": EWC(1000.0, "online"),
        "mixing_3": {key: {**v, "init_args": {"alpha": 0.3, "first": False}} for key, v in MIXING.items()},
        "replay_mixing": {**REPLAY, **MIXING},
    }
    orders = [["a", "b", "c"], ["c", "b", "a"]]
    axes = {"mitigation": values}
    path = write_study(tmp_path, llama, axes=axes, orders=orders, seeds=[0, 1], references=REFERENCES)
    code, _ = run_sweep(path, tmp_path / "out")
    assert code == 0
    counts = read_json(tmp_path / "out" / "plan.json")["counts"]
    assert counts["trained"] <= 0.6 * counts["separate"]
    for cell, scores in matrices(tmp_path / "out").items():
        assert scores == alone(tmp_path / "out", cell, tmp_path / "alone"), cell
