"""Every command and every snippet of the documentation and the README does what it says."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import residency
from residency.runs.config.preset_words import expand_presets
from residency.runs.config.short_help import verb_options
from residency.runs.estimate_words import take_estimate
from support.cli import call, printed_config, tiny_config, write_yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").glob("*/README.md"))]
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", re.MULTILINE | re.DOTALL)
VERBS = ("fit", "validate", "test", "predict", "export")


def _commands(page: Path) -> Iterator[str]:
    """Every command of a page: in code blocks, indented lines and tables."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for match in re.finditer(r"^(?: {4})?(residency \S[^\n#`]*)|`(residency [a-z]+ [^`]+)`", text, re.MULTILINE):
        yield " ".join((match[1] or match[2]).split())


COMMANDS = [
    pytest.param(command, id=f"{page.stem}: {command[:60]}")
    for page in PAGES
    for command in dict.fromkeys(_commands(page))
    # Placeholders and sentences are no commands.
    if not re.search(r"\b[A-Z]{3,}\b|\.\.\.|[<>]", command)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_is_one(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are presets, keys are keys, options are options; nothing is trained."""
    monkeypatch.chdir(ROOT)
    verb, *words = shlex.split(command)[1:]
    if verb in VERBS:
        keys = {option.key for options in verb_options(verb).values() for option in options}
        # Files that the reader has made are not here.
        here = ["quickstart" if w.endswith(".yaml") and not Path(w).is_file() else w for w in words]
        for word in expand_presets(take_estimate(here)[0]):
            key = word.partition("=")[0].removeprefix("--")
            known = key in (*keys, "config", "print_config", "help", "study", "cell", "allow") or key.startswith(
                "trainer."
            )
            below = any(key.startswith(f"{k.removesuffix('.NAME')}.") for k in keys)
            assert not word.startswith("--") or known or below, word
        return
    told = call(verb, "--help")
    assert told.code == 0
    for word in words:
        assert not word.startswith("--") or word.partition("=")[0] in told.out, word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_and_yaml_parse_and_names_exist(page: Path) -> None:
    for language, _, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "yaml":
            assert isinstance(yaml.safe_load(text), dict)
        if language == "python":
            tree = ast.parse(text)
            used = [
                n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "residency"
            ]
            assert not [name for name in used if name not in residency.__all__]


@pytest.mark.slow
def test_the_study_of_the_page_plans(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    study = yaml.safe_load(next(text for _, title, text in BLOCK.findall(page) if title == "study.yaml"))
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "base.yaml", tiny_config(tmp_path / "data", llama))
    path = write_yaml(tmp_path / "study.yaml", {**study, "base": "base.yaml"})
    result = call("sweep", path, "--dry-run", "--workers", "1", "--threads", "1")
    assert result.code == 0, result.err


@pytest.mark.slow
def test_a_stranger_adds_a_mitigation_from_the_pages_own_text(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/add_a_mitigation.md").read_text(encoding="utf-8")
    blocks = {title: text for _, title, text in BLOCK.findall(page)}
    for title, text in blocks.items():
        if "." in title:
            path = tmp_path / title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [sys.executable, *shlex.split(blocks["run the tests"])[1:], "-p", "no:cacheprovider"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    config = write_yaml(tmp_path / "c.yaml", tiny_config(tmp_path / "data", llama))
    command = shlex.split(blocks["train with it"])[1:]
    command[command.index("quickstart")] = str(config)
    assert call(*command).code == 0
    history = residency.load_run("runs/l1").history
    pull = history.filter(history["stage"] == 2)["loss/l1/pull"]
    assert pull[0] == 0.0
    assert pull[1] > 0.0
    assert printed_config(*command)["model"]["mitigations"]["l1"]["class_path"] == "mylab.l1_pull.L1Pull"
