"""Runs as things: listed, shown as far as they are, compared, removed."""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl
import pytest
from filelock import FileLock

import residency
from residency.core.errors import UserError
from residency.runs.listing import read_run
from support.cli import call, read_json, tiny_config, write_yaml


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("listed")
    config = write_yaml(folder / "c.yaml", tiny_config(folder / "data", llama))
    result = call("fit", "--config", config, "--run_dir", folder / "runs" / "whole")
    assert result.code == 0, result.err
    return folder / "runs" / "whole"


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """A finished run, and the same as it was after its first stage."""
    for name in ("whole", "half"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    half = tmp_path / "runs/half"
    (half / "results.json").unlink()
    shutil.rmtree(next((half / "stages").glob("2-*")))
    return tmp_path / "runs"


def test_ls_and_show(runs: Path) -> None:
    listed = call("ls", runs).out
    assert [line.split()[:2] for line in listed.splitlines()[:-1]] == [["1/2", "unfinished"], ["2/2", "done"]] or [
        line.split()[:2] for line in listed.splitlines()[:-1]
    ] == [["2/2", "done"], ["1/2", "unfinished"]]
    shown = call("show", runs / "half").out
    assert "unfinished, 1 of 2 stages" in shown
    assert len([line for line in shown.splitlines() if line.startswith(("base", "a "))]) == 2


def test_an_unfinished_run_loads_as_far_as_it_is(runs: Path) -> None:
    half, whole = residency.load_run(runs / "half"), residency.load_run(runs / "whole")
    rows = half.record["scores"]["nll"]["R"]
    assert rows == whole.record["scores"]["nll"]["R"][:2]
    assert half.scores.equals(whole.scores.filter(whole.scores["stage"] < 2))
    assert half.record["status"] == "unfinished"
    assert len(repr(whole).splitlines()) < 24
    assert max(map(len, repr(whole).splitlines()[1:])) <= 80


@pytest.mark.parametrize("content", ['{"": 1}', "[" * 5000, "null", '{"stage": 0, "means": {}, "checksum": "0"}'])
def test_a_damaged_record_counts_as_missing(content: str, runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "whole", run)
    (run / "results.json").write_text(content)
    assert (read_run(run).status, read_run(run).stages) == ("unfinished", 2)
    last = max((run / "stages").glob("*/stage.json"))
    last.write_text(content)
    assert read_run(run).stages == 1
    assert residency.load_run(run).record["status"] == "unfinished"


def test_compare_has_the_figures_of_the_record_in_80_columns(runs: Path) -> None:
    out = call("compare", runs).out
    assert max(map(len, out.splitlines())) <= 80
    frame = residency.compare([runs])
    record = read_json(runs / "whole/results.json")
    row = frame.row(by_predicate=pl.col("status") == "done", named=True)
    assert row["forgetting"] == record["summary"]["nll"]["forgetting"]
    assert row["average"] == -record["summary"]["nll"]["average"]
    assert row["average"] == pytest.approx(sum(record["scores"]["nll"]["R"][-1]) / 2)
    assert frame.row(by_predicate=pl.col("status") == "unfinished", named=True)["average"] is None


def test_rm_takes_runs_only(runs: Path) -> None:
    (runs / "other").mkdir()
    (runs / "other" / "config.yaml").write_text("a: 1\n")
    assert call("rm", runs / "half", runs / "other").code == 2
    assert (runs / "half").is_dir()
    assert call("rm", runs / "half", "--dry-run").code == 0
    assert (runs / "half").is_dir()
    with FileLock(runs / "half" / ".lock"), pytest.raises(UserError, match="in use"):
        residency.remove_run(runs / "half")
    assert call("rm", runs / "half").code == 0
    assert not (runs / "half").exists()
    assert len(residency.list_runs(runs)) == 1


def test_predictions_go_to_a_file_also_from_prompts_of_ones_own(finished: Path, tmp_path: Path) -> None:
    result = call(
        "predict", finished, "--stage", "1", "--domain", "a", "--limit", "3", "--output", tmp_path / "p.jsonl"
    )
    assert result.code == 0, result.err
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    assert len(lines) == 3
    (tmp_path / "own.txt").write_text("abc\n\nfgh\n")
    own = residency.predict(finished, stage=1, domain="a", prompts=tmp_path / "own.txt")
    assert [row["prompt"] for row in own] == ["abc", "fgh"]
    with pytest.raises(UserError, match="every line holds a prompt"):
        residency.predict(finished, prompts=tmp_path / "none.jsonl")
