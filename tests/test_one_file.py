"""The arithmetic of the architecture: a new plug-in is one file, one preset, one row, and nothing else is edited."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# kind -> (its file, its text, its preset, the preset's class, its row in tests/table.py, tests that have to see it)
FILES = {
    "adapter": (
        "adapters/brand_new.py",
        """
from residency.adapters.full import Full


class BrandNewAdapter(Full):
    '''Everything moves.'''
""",
        "--model.adapter configs/adapter/brand_new.yaml",
        "residency.adapters.BrandNewAdapter",
        'ADAPTERS["brand_new"] = AdapterRow(make=adapters.BrandNewAdapter, loads_with="transformers")',
    ),
    "mitigation": (
        "mitigations/penalties/brand_new.py",
        """
from residency.mitigations.base import Mitigation


class BrandNewPull(Mitigation):
    '''Pull every parameter to 0.

    Args:
        strength: Of the pull.
    '''

    def __init__(self, *, strength: float = 0.1) -> None:
        super().__init__()
        self.strength = strength

    def touches_training(self, index):
        return self.strength != 0 and super().touches_training(index)

    def loss_terms(self, module, batch, outputs):
        if not self.touches_training(module.stage.index):
            return {}
        leaves = module.adapter.trainable(module.model).values()
        return {"pull": self.strength * sum(leaf.square().sum() for leaf in leaves)}
""",
        "--model.mitigations.x configs/mitigation/brand_new.yaml",
        "residency.mitigations.BrandNewPull",
        'MITIGATIONS["brand_new"] = MitigationRow(\n'
        "    make=lambda: mitigations.BrandNewPull(strength=0.5),\n"
        "    off=lambda: mitigations.BrandNewPull(strength=0.0),\n)",
    ),
    "objective": (
        "objectives/brand_new.py",
        """
from residency.objectives.sft import SFT


class BrandNewObjective(SFT):
    '''As SFT.'''
""",
        "--model.objective configs/objective/brand_new.yaml",
        "residency.objectives.BrandNewObjective",
        'OBJECTIVES["brand_new"] = ObjectiveRow(make=objectives.BrandNewObjective)',
    ),
    "scorer": (
        "scorers/brand_new.py",
        """
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from residency.core.types import Row
from residency.scorers.base import Answer, Scorer


@dataclass(frozen=True, kw_only=True)
class BrandNewScorer(Scorer):
    '''Whether the answer begins as the completion does.'''

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"brand_new": {}}
    unit: ClassVar[str] = "share of rows that begin right"
    needs: ClassVar[Literal["generation"]] = "generation"

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        pairs = zip(rows, answers, strict=True)
        return [float((answer.text or "")[:1] == row.completion[:1]) for row, answer in pairs]
""",
        "--data.domains.code.scorers=[nll,configs/scorer/brand_new.yaml]",
        "residency.scorers.BrandNewScorer",
        'SCORERS["brand_new"] = ScorerRow(make=scorers.BrandNewScorer)',
    ),
    "domain": (
        "domains/brand_new.py",
        """
from residency.domains.jsonl import Jsonl


class BrandNewDomain(Jsonl):
    '''As Jsonl.'''
""",
        "",
        "",
        'READERS["brand_new"] = domains.BrandNewDomain',
    ),
    "metric": (
        "metrics/definitions/brand_new.py",
        """
from residency.metrics.definitions.base import About, Scores, utility


ABOUT = About(kind="level", title="best domain", help="best domain at the end", rank=900)


def brand_new(R: Scores, *, higher_is_better: bool) -> float:
    '''max_j u[T, j].'''
    return float(utility(R, higher_is_better=higher_is_better)[-1].max())
""",
        "",
        "",
        "",
    ),
}
SEES_METRIC = """
from residency.metrics.discovery import matrix_metrics
from residency.metrics.matrix import summary


def test_brand_new_metric_is_in_every_summary():
    assert "brand_new" in matrix_metrics()
    assert summary([[0, 0], [8, 1], [6, 9]], higher_is_better=True)["brand_new"] == 9
"""


def copied(folder: Path) -> Path:
    """The project with one new plug-in of each kind."""
    for name in ("src", "tests", "configs"):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)
    rows = ["\n\nfrom residency import adapters, domains, mitigations, objectives  # noqa: E402"]
    for kind, (file, text, words, path, row) in FILES.items():
        (folder / "src" / "residency" / file).write_text(f'"""New."""\n\nfrom __future__ import annotations\n{text}')
        rows.append(row)
        if words:
            line = f"# residency fit --config configs/quickstart.yaml {words}\n# New and tested by its row alone.\n"
            arguments = "init_args:\n  strength: 0.1\n" if kind == "mitigation" else ""
            arguments = "init_args:\n  label_smoothing: 0.0\n" if kind == "objective" else arguments
            (folder / "configs" / kind / "brand_new.yaml").write_text(f"{line}class_path: {path}\n{arguments}")
    with (folder / "tests" / "table.py").open("a") as table:
        table.write("\n".join(rows) + "\n")
    (folder / "tests" / "test_brand_new_metric.py").write_text(SEES_METRIC)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_file_one_preset_and_one_row_are_enough(tmp_path: Path) -> None:
    project = copied(tmp_path)
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-m",
        "not pairs and not slow",
        "-k",
        "brand_new or every_plug_in",
    ]
    words += ["tests/test_conformance.py", "tests/objectives", "tests/runs/config/test_presets.py"]
    words += ["tests/test_brand_new_metric.py", "tests/core/test_presets.py"]
    environment = {**os.environ, "PYTHONPATH": str(project / "src")}
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    ran = int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert ran >= 30, "the rows must have run every property"
