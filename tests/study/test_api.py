"""The verbs from Python, and finished runs and studies as tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import residency
from residency.core.tensor_files import write_json
from support.cli import call, read_json, tiny_config, write_yaml


@pytest.fixture(scope="module")
def config(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny stream."""
    return tiny_config(tmp_path_factory.mktemp("data"), llama)


@pytest.fixture(scope="module")
def run(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from a mapping."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    record = residency.fit(config, run_dir=folder)
    assert record == read_json(folder / "results.json")
    return folder


def test_a_mapping_a_file_and_the_command_are_one(run: Path, config: dict[str, Any], tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "tiny.yaml", config)
    scores = residency.load_run(run).record["scores"]
    assert residency.fit(path, run_dir=tmp_path / "file")["scores"] == scores
    assert call("fit", "--config", path, "--run_dir", tmp_path / "command").code == 0
    assert residency.load_run(tmp_path / "command").record["scores"] == scores
    kept = [(folder / "config.yaml").read_text() for folder in (run, tmp_path / "file", tmp_path / "command")]
    assert kept[0] == kept[1] == kept[2]


def test_a_complete_run_gives_its_record(run: Path, config: dict[str, Any]) -> None:
    assert residency.fit(config, run_dir=run) == read_json(run / "results.json")


def test_a_mistake_is_an_exception(config: dict[str, Any], tmp_path: Path) -> None:
    wrong = {**config, "data": {**config["data"], "batchsize": 3}}
    with pytest.raises(residency.UserError, match=r"data\.batchsize: 3.*\n.*\n.*'data\.batch_size'"):
        residency.fit(wrong, run_dir=tmp_path)
    with pytest.raises(residency.UserError, match=r"cannot read no\.yaml"):
        residency.fit("no.yaml")


def test_run(run: Path) -> None:
    found = residency.load_run(run)
    assert found.history.select("stage", "step").rows() == [(k, n) for k in (1, 2) for n in (1, 2, 3)]
    assert {"loss", "loss/task", "lr", "tokens"} <= set(found.history.columns)
    assert found.scores.columns == ["stage", "column", "row", "scorer", "value", "tokens", "weight", "ended"]
    nll = found.scores.filter(pl.col("scorer") == "nll")
    means = nll.group_by("stage", "column").agg((pl.col("value") * pl.col("tokens")).sum() / pl.col("tokens").sum())
    matrix = {(stage, column): value for stage, column, value in means.rows()}
    for stage, row in enumerate(found.record["scores"]["nll"]["R"]):
        assert [matrix[stage, name] for name in ("a", "b")] == pytest.approx(row, rel=1e-12)


def test_folders_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(residency.UserError, match="holds no run"):
        residency.load_run(tmp_path)
    with pytest.raises(residency.UserError, match=r"plan\.json"):
        residency.load_study(tmp_path)


def test_study(run: Path, tmp_path: Path) -> None:
    cells = [{"id": i, "axes": {"mitigation": i, "seed": "x"}, "seed": 0} for i in ("one", "two")]
    write_json(tmp_path / "plan.json", {"study": {}, "cells": cells})
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "one").symlink_to(run)
    found = residency.load_study(tmp_path)
    assert list(found.runs) == ["one"]
    assert found.summary.columns[:6] == ["cell", "status", "seed", "mitigation", "axis seed", "scorer"]
    assert found.summary.filter(pl.col("cell") == "two").select("status", "scorer").rows() == [("missing", None)]
    nll = found.summary.row(by_predicate=(pl.col("cell") == "one") & (pl.col("scorer") == "nll"), named=True)
    assert nll["forgetting"] == found.runs["one"].record["summary"]["nll"]["forgetting"]


def test_names_are_loaded_when_they_are_asked_for() -> None:
    assert {"fit", "sweep", "load_run", "load_study"} <= set(dir(residency))
    with pytest.raises(AttributeError, match="no attribute 'fti'"):
        _ = residency.fti
    code = "import sys, residency; assert 'torch' not in sys.modules; residency.UserError"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
