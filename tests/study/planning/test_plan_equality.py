"""A plan with composed configs equals the plan with every cell's config parsed as a whole, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from residency.runs.cli import ResidencyCLI, parse
from residency.runs.compose import Composer
from residency.study import load_study
from residency.study.planning import resolve
from residency.study.planning.prepare import prepare
from support.cli import tiny_config, write_yaml

STUDY: dict[str, Any] = {
    "name": "equal",
    "base": "base.yaml",
    "axes": {
        "adapter": {"lora": {"model.adapter": "lora", "model.adapter.r": 4}, "dora": {"model.adapter": "dora"}},
        "mitigation": {
            "none": {},
            "ewc_1": {"model.mitigations.ewc": "ewc", "model.mitigations.ewc.strength": 1.0},
            "replay": {"model.mitigations.replay": "replay"},
        },
    },
    "orders": "latin",
    "seeds": [0, 1],
    "budget": {"steps": 2},
    "references": ["frozen", "independent", "joint"],
}


class _WholeLines(Composer):
    """Parses every cell by itself."""

    def parse(self, words: tuple[str, ...]) -> ResidencyCLI:
        return parse(["fit", *words, *self._fixed])


def _plan(path: Path, folder: Path) -> str:
    """Everything that a plan says: entries, configs in their order, rows, tasks with their needs and command lines."""
    found = prepare(load_study(path), folder=folder, store=folder / "store")
    cells = [[one.cell.id, dict(one.config), dict(one.rows), vars_of(one)] for one in found.missing]
    tasks = [[key, node.title, node.cells, node.trains, node.task.spec] for key, node in found.tree.nodes.items()]
    return json.dumps([found.entries, cells, tasks], default=str)


def vars_of(one: resolve.Resolved) -> list[Any]:
    keys = [[k.trained, k.weights, k.finished, list(k.watched)] for k in one.keys.stages]
    runner = one.stage_cache.runner
    return [keys, str(runner.settings), [str(stage) for stage in runner.stages], one.frozen, one.domains]


@pytest.mark.slow
def test_composed_and_whole_lines_plan_the_same(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_yaml(tmp_path / "base.yaml", tiny_config(tmp_path / "data", llama))
    path = write_yaml(tmp_path / "study.yaml", STUDY)
    composed = _plan(path, tmp_path / "out")
    monkeypatch.setattr("residency.runs.compose.Composer", _WholeLines)
    original = resolve.Resolver.resolve

    def unshared(self: resolve.Resolver, cell: Any) -> resolve.Resolved:
        self._opened.clear()
        return original(self, cell)

    monkeypatch.setattr(resolve.Resolver, "resolve", unshared)
    assert _plan(path, tmp_path / "out") == composed
    assert len(json.loads(composed)[0]) == 40
