"""Plug-ins of every kind in a package outside of this project: its own test file, its own presets, a run of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import residency
from support.cli import tiny_config, write_yaml
from support.new_plug_ins import FILES

SOURCE = Path(residency.__file__).parents[1]
TESTS = """
from mylab.adapter import BrandNewAdapter
from mylab.domain import BrandNewDomain
from mylab.metrics import brand_new
from mylab.mitigation import BrandNewPull
from mylab.objective import BrandNewObjective
from mylab.scorer import BrandNewScorer
from residency.testing import (
    AdapterRow, DomainRow, MetricRow, MitigationRow, ObjectiveRow, ScorerRow, conformance, write_domain,
)


def read(folder):
    files = write_domain(folder, "a")["init_args"]
    return BrandNewDomain(train=files["train"], test=files["test"])


test_conformance = conformance(
    adapters={"mine": AdapterRow(make=BrandNewAdapter, loads_with="transformers")},
    mitigations={"pull": MitigationRow(make=BrandNewPull, off=lambda: BrandNewPull(strength=0.0))},
    objectives={"mine": ObjectiveRow(make=BrandNewObjective)},
    scorers={"brand_new": ScorerRow(make=BrandNewScorer)},
    metrics={"brand_new": MetricRow(function=brand_new.brand_new, about=brand_new.ABOUT)},
    domains={"mine": DomainRow(make=read)},
)
"""
BROKEN = """
from mylab.mitigation import BrandNewPull
from residency.testing import MitigationRow, conformance

test_conformance = conformance(
    mitigations={"pull": MitigationRow(make=BrandNewPull, off=lambda: BrandNewPull(strength=0.4))},
    streams=[],
)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with the package `mylab`, its presets, and nothing of this project."""
    for kind, (_, text, _, path, _) in FILES.items():
        file = "metrics/brand_new.py" if kind == "metric" else f"{kind}.py"
        written = tmp_path / "mylab" / file
        written.parent.mkdir(parents=True, exist_ok=True)
        (written.parent / "__init__.py").touch()
        written.write_text(f'"""New."""\n\nfrom __future__ import annotations\n{text}')
        if not path:
            continue
        arguments = {"mitigation": {"strength": 0.1}, "objective": {"label_smoothing": 0.0}}.get(kind, {})
        (tmp_path / "configs" / kind).mkdir(parents=True)
        preset = {"class_path": f"mylab.{kind}.{path.rpartition('.')[2]}", "init_args": arguments}
        write_yaml(tmp_path / "configs" / kind / "brand_new.yaml", preset)
    return tmp_path


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a module of Python in the folder, which is on its path."""
    path = os.pathsep.join([str(SOURCE), str(folder)])
    environment = {**os.environ, "PYTHONPATH": path, "RESIDENCY_METRICS": "mylab.metrics"}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_test_file_of_a_few_lines_runs_every_property(package: Path) -> None:
    (package / "test_mylab.py").write_text(TESTS)
    (package / "test_broken.py").write_text(BROKEN)
    done = python(package, "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-rf", "--show-capture=no")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 4, done.stdout[-6000:]
    assert all("test_broken.py" in line for line in failed), "what is right must pass"
    assert "at strength 0 a study shares its stages with runs without it" in done.stdout
    assert "off: /model" in done.stdout or "differs from a run without it" in done.stdout
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed >= 35, "the rows must have run every property"


@pytest.mark.slow
def test_presets_of_its_own_are_given_by_name(package: Path, llama: Path) -> None:
    config = tiny_config(package / "data", llama)
    config["model"] |= {"adapter": "brand_new", "objective": "brand_new", "mitigations": {"x": "brand_new"}}
    domain = {**config["data"]["domains"]["a"], "class_path": "mylab.domain.BrandNewDomain"}
    (package / "configs" / "domain").mkdir()
    domain["init_args"]["scorers"] = ["nll", "brand_new"]
    write_yaml(package / "configs" / "domain" / "brand_new.yaml", domain)
    config["data"]["domains"]["a"] = "brand_new"
    write_yaml(package / "tiny.yaml", config)
    done = python(package, "residency", "fit", "--config", "tiny.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((package / "runs/tiny/results.json").read_text())
    assert record["scores"]["brand_new"]["unit"] == "share of rows that begin right"
    assert "brand_new" in record["summary"]["nll"], "the metric of the package is in every summary"


@pytest.mark.slow
def test_without_pytest_the_error_says_what_to_install() -> None:
    hide = "import sys; sys.modules['pytest'] = None; import residency.testing"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "fix: pip install pytest" in done.stderr
    imports = "import sys, residency.runs.cli; sys.exit('pytest' in sys.modules or 'residency.testing' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imports], check=False).returncode == 0
