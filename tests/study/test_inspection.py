"""Observers in a study: what they find is in every cell's record, as in a run on its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from residency.runs.config.sources import read_yaml
from support.cli import call, read_json, write_yaml
from support.tiny_sweeps import REPLAY, run_sweep, write_study

OBSERVERS = {
    "gradients": {"class_path": "residency.inspection.GradientNorms"},
    "weights": {"class_path": "residency.inspection.WeightDriftByLayer"},
}


@pytest.fixture(scope="module")
def swept(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was made without observers, and then with them, on one store."""
    folder = tmp_path_factory.mktemp("inspected")
    study = write_study(folder, llama, domains="ab", axes={"mitigation": {"none": {}, "replay": REPLAY}})
    assert run_sweep(study, folder / "blind", store=folder / "store")[0] == 0
    base = read_yaml(folder / "base.yaml", what="the base")
    write_yaml(folder / "base.yaml", {**base, "inspection": OBSERVERS})
    assert run_sweep(study, folder / "out", store=folder / "store")[0] == 0
    return folder


def _seen(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = record["inside"]
    return rows


@pytest.mark.parametrize("cell", ["none-s0", "replay-s0"])
def test_a_cell_has_what_a_run_on_its_own_finds(cell: str, swept: Path) -> None:
    seen = _seen(read_json(swept / "out" / "cells" / cell / "results.json"))
    assert [set(row) for row in seen] == [set(), set(OBSERVERS), set(OBSERVERS)]
    assert [row["gradients"]["steps"] for row in seen[1:]] == [2, 2]
    config = swept / "out" / "cells" / cell / "config.yaml"
    alone = call("fit", "--config", config, "--store=null", "--run_dir", swept / "alone" / cell)
    assert alone.code == 0, alone.err
    assert _seen(read_json(swept / "alone" / cell / "results.json")) == seen


def test_looking_changes_no_score(swept: Path) -> None:
    for cell in ("none-s0", "replay-s0"):
        one, other = (read_json(swept / into / "cells" / cell / "results.json") for into in ("blind", "out"))
        assert one["scores"] == other["scores"]
        assert "inside" not in one
