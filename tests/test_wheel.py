"""From install to paper with the built wheel alone: an empty folder, a fresh environment, no repository.

The environment sees the packages of the one that runs the tests (a `.pth` file), not this project: what is tested is
what the wheel holds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.wheel, pytest.mark.timeout(3000)]

SMALL = ("--trainer.max_steps=2", "--evaluation.generation_rows=2", "--evaluation.accuracy_rows=2")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    # A copy: what an earlier build has left in the working tree would go into the wheel.
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`residency` of an environment that holds the wheel, and beside it only what the project depends on."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    place = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(place), str(wheel)], check=True)
    # Later on the path than the wheel; editable installs of this project are not followed from there.
    (place / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (folder / "bin" / "residency").write_text(
        f"#!{folder}/bin/python\nimport sys\nfrom residency.__main__ import main\nsys.exit(main())\n"
    )
    (folder / "bin" / "residency").chmod(0o755)
    return folder / "bin" / "residency"


def test_the_presets_are_in_the_wheel(wheel: Path) -> None:
    names = {name.removeprefix("residency/configs/") for name in zipfile.ZipFile(wheel).namelist()}
    assert {str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml")} <= names


def test_from_install_to_export_without_the_repository(command: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RESIDENCY_PRESETS")}
    environment |= {"WANDB_MODE": "disabled", "PYTHONNOUSERSITE": "1"}

    def run(*words: str, codes: tuple[int, ...] = (0,)) -> str:
        done = subprocess.run(
            [command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode in codes, f"{words}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    assert str(command.parents[1]) in run("presets", "adapter")
    run("assets")
    run("fit", "--config", "quickstart", "--model.adapter", "dora", "--model.mitigations.ewc", "ewc", *SMALL)
    assert json.loads((tmp_path / "runs/quickstart/results.json").read_text())["status"] == "done"
    run("sweep", "quickstart")
    run("report", "studies/quickstart")
    assert (tmp_path / "studies/quickstart/report/index.html").is_file()
    run("gate", "studies/quickstart", "--max", "forgetting=100", codes=(0,))
    for name in ("law", "tickets", "notes"):
        rows = [{"prompt": f"{name} {n}?", "completion": f"{name} answer {n}"} for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("init", "mine", "--data", "law.jsonl", "tickets.jsonl", "notes.jsonl")
    run("fit", "--config", "mine/config.yaml", "--name", "mine", *SMALL)
    run("export", "runs/quickstart", "--stage", "2")
    exported = next((tmp_path / "runs/quickstart/export").iterdir())
    assert "would go to me/it" in run("push", str(exported), "--repo", "me/it", "--dry-run")
    assert len(run("ls").splitlines()) == 7  # two runs, four cells, their number
