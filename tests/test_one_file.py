"""The arithmetic of the architecture: a new plug-in is one file, one preset, one row, and nothing else is edited."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.new_plug_ins import FILES

ROOT = Path(__file__).parents[1]

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
        "not pairs",  # a domain that is new counts as long
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
