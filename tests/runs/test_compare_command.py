"""`residency ab`: stages of one run and of two, on the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from residency.adapters import Full
from residency.core.errors import UserError
from residency.runs.compare_command import compare_stages
from residency.testing.tiny_runs import train
from support.cli import call


@pytest.fixture(scope="module")
def run(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ab") / "run"
    train(folder, llama, Full(), {}, steps=3)
    return folder


def _values(run: Path, stage: int, column: str, scorer: str) -> dict[str, float]:
    (path,) = (run / "stages").glob(f"{stage}-*/scores.parquet")
    mine = (pl.col("column") == column) & (pl.col("scorer") == scorer)
    return dict(pl.read_parquet(path).filter(mine).select("row", "value").iter_rows())


def test_base_against_tuned(run: Path) -> None:
    """Means are those of the record; the rows that regressed are those whose score is worse."""
    record = json.loads((run / "results.json").read_text())
    columns = [*record["domains"], *record["probes"]]
    found = compare_stages(run)
    assert {one["scorer"] for one in found} == {*record["scores"]}
    for one in found:
        entry, place = record["scores"][one["scorer"]], columns.index(one["column"])
        assert one["before"] == pytest.approx(entry["R"][0][place])
        assert one["after"] == pytest.approx(entry["R"][-1][place])
        old, new = (_values(run, k, one["column"], one["scorer"]) for k in (0, len(record["domains"])))
        sign = 1 if entry["higher_is_better"] else -1
        assert {*one["regressed"]} == {row for row in old if sign * new[row] < sign * old[row]}


def test_a_run_against_itself_changes_nothing(run: Path, tmp_path: Path) -> None:
    result = call("ab", run, run, "--scorer", "nll", f"--json={tmp_path / 'ab.json'}")
    assert result.code == 0
    assert "+0.000" in result.out
    found = json.loads((tmp_path / "ab.json").read_text())
    assert all((one["change"], one["p"], one["worse"], one["better"]) == (0.0, 1.0, 0.0, 0.0) for one in found)


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no results\.json"):
        compare_stages(tmp_path)
    with pytest.raises(UserError, match="stage 9"):
        compare_stages(run, after=9)
    with pytest.raises(UserError, match="no chrf of the same rows"):
        compare_stages(run, scorer="chrf")
