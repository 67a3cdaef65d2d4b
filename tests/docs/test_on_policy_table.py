"""The table of `experiments/on_policy`: figures by hand from made-up records."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SEEDS = 8
SCRIPT = Path(__file__).parents[2] / "experiments" / "on_policy" / "table.py"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("on_policy_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "on_policy_table", module)
    spec.loader.exec_module(module)
    return module


def cell(folder: Path, objective: str, seed: int, rate: str, *, new: float, old: float, nats: float, kl: float) -> None:
    """Starts with 0.2 of the new task, 0.9 of the old one, at 1 nat per token of the old one."""
    record = {
        "status": "done",
        "axes": {"objective": objective, "rate": rate},
        "seed": seed,
        "domains": ["dbpedia", "agnews"],
        "scores": {
            "accuracy": {"R": [[0.1, 0.1], [0.9, 0.2], [old, new]]},
            "nll": {"R": [[3.0, 3.0], [1.0, 2.0], [nats, 0.5]]},
        },
        "inside": [{}, {}, {"kl": {"columns": {"agnews": kl}}}],
    }
    path = folder / "cells" / f"{objective}-{seed}-{rate}" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """At accuracy 0.6 `sft` has forgotten twice what `rloo` has; forgetting is 2 KL."""
    for seed in range(SEEDS):
        for objective, cost in (("sft", 1.0), ("rloo", 0.49 + 0.02 * (seed % 2))):
            for rate, new, share in (("low", 0.4, 0.5), ("high", 0.8, 1.5)):
                lost = cost * share
                cell(tmp_path, objective, seed, rate, new=new, old=0.9 - 0.1 * share, nats=1 + lost, kl=lost / 2)
    cell(tmp_path, "alone", 0, "low", new=0.7, old=0.5, nats=2.0, kl=0.1)
    return tmp_path


def test_forgetting_is_read_where_an_accuracy_is_reached(table: Any, study: Path) -> None:
    paths = table.read([study])
    assert {*paths} == {"sft", "rloo"}, "what lacks its high rate is left out"
    start, low, high = paths["sft"][0]
    assert (start.accuracy, start.old_nats, start.kl) == (0.2, 0.0, 0.0)
    assert (low.accuracy, high.accuracy) == (0.4, 0.8)
    found = table.at_level(paths["sft"][0], 0.6)
    assert found.old_nats == pytest.approx(1.0)
    assert found.old_accuracy == pytest.approx(0.1)
    assert found.kl == pytest.approx(0.5)
    assert table.at_level(paths["sft"][0], 0.2) == start
    assert table.at_level(paths["sft"][0], 0.81) is None


def test_a_difference_is_judged_as_everywhere(table: Any, study: Path) -> None:
    paths = table.read([study])
    matched = {(0.6, name): table._reached(seeds, 0.6) for name, seeds in paths.items()}
    ((key, evidence),) = table.judged(matched).items()
    assert key == (0.6, "rloo")
    assert evidence.estimate == pytest.approx(0.5), "nats less than sft, by seed"
    assert evidence.word == "better"


def test_what_is_printed(table: Any, study: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["table.py", str(study), "--levels", "0.6", "0.9"])
    table.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| sft | low | 0.400 ± 0.000 | 0.050 ± 0.000 | 0.500 ± 0.000 | 0.250 ± 0.000 |" in lines
    assert "| 0.9 | rloo | reached by 0 of 8 seeds | | | |" in lines
    (row,) = (line for line in lines if line.startswith("| 0.6 | rloo"))
    assert "| 0.100 ± 0.000 | 0.500 ± 0.011 | 0.250 ± 0.005 | better: +0.500 " in row
    assert lines[-1].startswith("R² of forgetting from KL over 32 states")
    fits = table.fits(
        [point for seeds in table.read([study]).values() for path in seeds.values() for point in path[1:]]
    )
    assert fits["linear"] == pytest.approx(1.0)
