"""The recipe of the page on gates, as the CI script of a repository of its own: what it says and how it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.synthetic_studies import write_study

ROOT = Path(__file__).parents[2]

BASE = [[5.0, 5.0], [1.0, 5.0], [3.0, 1.0]]
KEPT = [[5.0, 5.0], [1.0, 5.0], [1.0, 1.0]]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with the page's script."""
    page = (ROOT / "docs" / "gates.md").read_text(encoding="utf-8")
    (text,) = re.findall(r'^```bash title="\.ci/forgetting\.sh"\n(.*?)^```', page, re.MULTILINE | re.DOTALL)
    script = tmp_path / "repository" / ".ci" / "forgetting.sh"
    script.parent.mkdir(parents=True)
    script.write_text(text, encoding="utf-8")
    script.chmod(0o755)
    git = ["git", "-c", "user.name=ci", "-c", "user.email=ci@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "gate"]):
        subprocess.run([*git, *words], cwd=script.parents[1], check=True, capture_output=True)
    return script.parents[1]


def run(repository: Path, study: Path) -> subprocess.CompletedProcess[str]:
    """The script with `residency` on the path."""
    bin = repository / "bin"
    bin.mkdir(exist_ok=True)
    (bin / "residency").write_text(f'#!/bin/sh\nexec {sys.executable} -m residency "$@"\n', encoding="utf-8")
    (bin / "residency").chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    command = [".ci/forgetting.sh", str(study)]
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("matrix", "code"), [(KEPT, 0), (BASE, 4)], ids=["kept", "forgotten"])
def test_the_script_ends_as_the_page_says(matrix: list[list[float]], code: int, repository: Path) -> None:
    study = write_study(repository / "studies" / "s", {"none": matrix}, domains=("a", "b"), seeds=range(3))
    done = run(repository, study)
    assert done.returncode == code, done.stdout + done.stderr
    told = json.loads((repository / "gate.json").read_text())
    assert told["passed"] is (code == 0)
    assert [one["state"] for one in told["limits"]] == [{0: "ok", 4: "crossed"}[code], "ok"]


def test_a_wrong_folder_is_another_code(repository: Path) -> None:
    assert run(repository, repository / "nothing").returncode == 2
