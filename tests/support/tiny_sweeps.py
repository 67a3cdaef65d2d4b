"""Sweep over tiny studies, in this process or with real workers."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from residency.runs.cli import parse
from residency.runs.folder import RunFolder
from residency.runs.stream import train_stream
from residency.study.command import sweep
from residency.study.executors import Executor, Outcome, Task
from residency.study.worker import run_task
from residency.testing.tiny_models import write_domain
from support.cli import tiny_config, write_yaml

__all__ = ["EWC", "MIXING", "REPLAY", "Inline", "alone", "matrices", "mitigation", "run_sweep", "write_study"]


def mitigation(kind: str, **arguments: Any) -> dict[str, Any]:
    """The override of an axis that adds one mitigation."""
    return {
        f"model.mitigations.{kind.lower()}": {"class_path": f"residency.mitigations.{kind}", "init_args": arguments}
    }


REPLAY = mitigation("Replay", ratio=0.25, capacity=8)
MIXING = mitigation("WeightMixing", alpha=0.5, first=False)


def EWC(strength: float, mode: str = "separate") -> dict[str, Any]:
    """EWC with a strength."""
    return mitigation("EWC", strength=strength, mode=mode, decay=1.0, fisher_samples=4, batch_tokens=256)


def write_study(folder: Path, backbone: Path, *, steps: int = 2, domains: str = "abc", **study: Any) -> Path:
    """A study over tiny domains; its file."""
    base = tiny_config(folder / "data", backbone)
    base["trainer"]["max_steps"] = steps
    kinds = {"b": "label"}
    written = {name: write_domain(folder / "data", name, kind=kinds.get(name, "generative")) for name in domains}
    # Generation takes most of the time of an evaluation, and is tested elsewhere.
    for name, domain in written.items():
        domain["init_args"]["scorers"] = ["nll", "accuracy"] if name in kinds else ["nll"]
    base["data"]["domains"] = written
    write_yaml(folder / "base.yaml", base)
    return write_yaml(folder / "study.yaml", {"name": "tiny", "base": "base.yaml", **study})


class Inline(Executor):
    """Runs every task in this process, when it is submitted."""

    def __init__(self, logs: Path | None = None) -> None:
        self.ran: list[str] = []
        self.outcomes: list[Outcome] = []

    @property
    def slots(self) -> int:
        """One."""
        return 1

    def submit(self, task: Task) -> None:
        """Run it."""
        self.ran.append(task.id)
        self.outcomes.append(Outcome(task_id=task.id, exit_code=run_task(task.spec)))

    def wait(self, timeout: float) -> Sequence[Outcome]:
        """All that ran."""
        found, self.outcomes = self.outcomes, []
        return found

    def cancel(self, task_id: str) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """Nothing is held."""


def run_sweep(path: Path, into: Path, executor: Any = Inline, **options: Any) -> tuple[int, str]:
    """Sweep; (exit code, what was printed)."""
    out = io.StringIO()
    console = Console(file=out, width=200)
    code = sweep(path, study_dir=into, console=console, threads=1, workers=1, executor=executor, **options)
    return code, out.getvalue()


def matrices(study: Path) -> dict[str, Mapping[str, Any]]:
    """Scores by cell."""
    found = sorted(study.glob("cells/*/results.json"))
    return {path.parent.name: json.loads(path.read_text())["scores"] for path in found}


def alone(study: Path, cell: str, into: Path) -> Mapping[str, Any]:
    """The scores that `residency fit` gives for a cell, without a store."""
    cli = parse(["fit", "--config", str(study / "cells" / cell / "config.yaml"), "--store=null"])
    parts: dict[str, Any] = {"module": cli.model, "data": cli.datamodule, "trainers": cli.trainers}
    record = train_stream(**parts, folder=RunFolder(into / cell), settings=cli.settings, config=cli.resolved)
    scores: Mapping[str, Any] = json.loads(json.dumps(record["scores"]))
    return scores
