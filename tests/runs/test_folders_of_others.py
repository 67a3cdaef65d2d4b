"""Commands write into what is new, empty or their own, whatever its name is."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cli import call, tiny_config, write_yaml
from support.tiny_sweeps import write_study


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with things of its own."""
    files = {
        ".bashrc.tmp": "mine",
        "sub/.editor.swp.tmp": "mine",
        "config.yaml": "a: of another program",
        "results.json": '{"mine": 1}',
        "study.yaml": "# with a comment\nname: mine\n",
        "index.html": "<html>mine</html>",
        "sweep.yaml": "mine: true",
    }
    for name, content in files.items():
        (tmp_path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / name).write_text(content)
    return tmp_path / "home"


def test_no_command_writes_into_a_folder_of_something_else(llama: Path, home: Path, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "c.yaml", tiny_config(tmp_path / "data", llama))
    study = write_study(tmp_path / "study", llama, domains="ab", axes={"mitigation": {"none": {}}})
    run = tmp_path / "run"
    assert call("fit", "--config", config, "--run_dir", run, "--trainer.max_steps=1").code == 0
    before = tree(home)
    for words in (
        ("fit", "--config", config, "--run_dir", home),
        ("sweep", study, "--study_dir", home),
        ("sweep", study, "--study_dir", tmp_path / "s", "--store", home),
        ("report", run, "--output", home),
        ("sweep", study, "--emit-wandb", home / "sweep.yaml"),
        ("export", run, "--output", home),
    ):
        result = call(*words)
        assert result.code in (2, 3), (words, result.out, result.err)
        assert tree(home) == before, words
    assert call("sweep", study, "--emit-wandb", home / "sweep.yaml", "--overwrite").code == 0
    assert call("sweep", study, "--emit-wandb", home / "sweep.yaml").code == 0, "now it is ours"


@pytest.mark.parametrize("name", ["r[12]", "a*b?", "[", "with blank", "ü→"])
def test_a_folder_of_any_name_is_a_folder(name: str, llama: Path, tmp_path: Path) -> None:
    for beside in ("r1", "aXbY"):
        (tmp_path / beside).mkdir()
    place = tmp_path / name
    config = tiny_config(tmp_path / "data", llama)
    config["trainer"]["max_steps"] = 1
    file = write_yaml(tmp_path / "c.yaml", config)
    result = call("fit", "--config", file, "--run_dir", place / "run", "--store", place / "store")
    assert result.code == 0, result.err
    assert call("store", "verify", place / "store").code == 0
    from residency.runs.loaded import load_run

    assert load_run(place / "run").scores.height
