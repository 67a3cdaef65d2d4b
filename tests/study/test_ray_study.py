"""A study on two Ray nodes, one of which is lost while stages run, ends as it does on this machine, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from residency.study.command import sweep
from residency.study.executors.ray import RayExecutor
from residency.study.views.events import Event, Watcher
from support.cli import read_json, tiny_config, write_yaml


class LosesANode(Watcher):
    """Removes the second node as soon as two stages train at once."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.training: set[str] = set()
        self.events: list[Event] = []
        self.lost = False

    def event(self, event: Event) -> None:
        """Watch who trains."""
        self.events.append(event)
        if event.kind == "progress" and event.phase == "training":
            self.training.add(event.task)
        elif event.kind not in ("progress", "scores"):
            self.training.discard(event.task)
        if len(self.training) == 2 and not self.lost:
            self.lost = True
            self.cluster.remove_node(next(iter(self.cluster.worker_nodes)))


def study(folder: Path, llama: Path) -> Path:
    """Two mitigations and two seeds: stages that can run side by side, long enough to be caught training."""
    base = tiny_config(folder / "data", llama)
    base["trainer"]["max_steps"] = 120
    for domain in base["data"]["domains"].values():
        domain["init_args"]["scorers"] = ["nll"]
    write_yaml(folder / "base.yaml", base)
    ewc = {"class_path": "residency.mitigations.EWC", "init_args": {"strength": 10.0, "fisher_samples": 4}}
    mitigations = {"none": {}, "ewc": {"model.mitigations.old": ewc}}
    content = {"name": "s", "base": "base.yaml", "axes": {"m": mitigations}, "seeds": [0, 1]}
    return write_yaml(folder / "study.yaml", content)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_is_lost_while_stages_run(llama: Path, cluster: Any, tmp_path: Path) -> None:
    if not cluster.worker_nodes:
        cluster.add_node(num_cpus=1, include_dashboard=False)
    path = study(tmp_path, llama)
    watcher = LosesANode(cluster)

    def on_ray(logs: Path) -> RayExecutor:
        return RayExecutor(threads=1, logs=logs, address=cluster.address)

    assert sweep(path, study_dir=tmp_path / "ray", threads=1, executor=on_ray, watchers=[watcher]) == 0
    assert watcher.lost
    assert "retried" in [event.kind for event in watcher.events]
    assert not [event for event in watcher.events if event.kind in ("failed", "skipped")]
    assert sweep(path, study_dir=tmp_path / "local", workers=2, threads=1, watchers=[]) == 0
    cells = sorted(cell.name for cell in (tmp_path / "local" / "cells").iterdir())
    assert len(cells) == 4
    for cell in cells:
        there, here = (tmp_path / place / "cells" / cell for place in ("ray", "local"))
        assert read_json(there / "results.json")["scores"] == read_json(here / "results.json")["scores"]
        rows = sorted(here.glob("stages/*/scores.parquet"))
        assert len(rows) == 3
        for row in rows:
            assert pl.read_parquet(there / row.relative_to(here)).equals(pl.read_parquet(row))
