"""A config is data until a key with a type names a class of that type; nothing of the standard library ever is one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from residency.core.errors import UserError
from residency.core.yaml_files import read_yaml
from residency.runs.config.imports import imported_outside, take_allow
from support.cli import call, read_json, tiny_config, write_yaml


def with_value(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    *path, last = key.split(".")
    part = config
    for name in path:
        part = part[name]
    part[last] = value
    return config


def runs(*words: str) -> dict[str, Any]:
    """What would run a program."""
    return {"class_path": "subprocess.Popen", "init_args": {"args": list(words)}}


@pytest.mark.parametrize(
    "found",
    [
        {"class_path": "os.system", "init_args": {"command": "touch PWNED"}},
        runs("touch", "PWNED"),
        [runs("touch", "PWNED")],
        {"deep": {"er": runs("touch", "PWNED")}},
    ],
    ids=["function", "class", "list", "deep"],
)
def test_a_key_without_a_type_is_data(found: Any, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path / "data", llama) | {"axes": {"x": found}}
    config["trainer"]["max_steps"] = 1
    del config["data"]["domains"]["b"]
    result = call("fit", "--config", write_yaml(tmp_path / "c.yaml", config), "--run_dir", tmp_path / "run")
    assert result.code == 0, result.err
    assert not (tmp_path / "PWNED").exists()
    assert read_json(tmp_path / "run" / "results.json")["axes"] == {"x": found}


TYPED = {
    "trainer.callbacks": [runs("touch", "PWNED")],
    "trainer.logger": runs("touch", "PWNED"),
    "model.adapter": {"class_path": "os.system"},
    "model.mitigations": {"x": {"class_path": "builtins.exec", "init_args": {"source": "1"}}},
    "model.scheduler": {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "os._exit"}},
    "data.domains.a": {"class_path": "torch.os.system"},
    "model.backbone": {"class_path": "antigravity.fly"},
    "model.objective": {"class_path": "jsonargparse.set_parsing_settings"},
}


@pytest.mark.parametrize("key", TYPED)
def test_no_code_of_the_standard_library_is_imported(
    key: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("antigravity", None)
    config = with_value(tiny_config(tmp_path / "data", llama), key, TYPED[key])
    result = call("fit", "--config", write_yaml(tmp_path / "c.yaml", config), "--run_dir", tmp_path / "run")
    assert result.code == 2, result.out
    assert "standard library" in result.err
    assert not (tmp_path / "PWNED").exists()
    assert not (tmp_path / "run").exists()
    assert "antigravity" not in sys.modules


def test_the_run_of_somebody_else_runs_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`test`, `predict` and `export` read the config that lies in the folder."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path / "data", llama)
    config["trainer"]["max_steps"] = 1
    run = tmp_path / "run"
    assert call("fit", "--config", write_yaml(tmp_path / "c.yaml", config), "--run_dir", run).code == 0
    kept = read_yaml(run / "config.yaml", what="the run")
    for key in ("axes.x", "trainer.callbacks"):
        changed = with_value({**kept, "axes": {}}, key, runs("touch", "PWNED") if key == "axes.x" else TYPED[key])
        write_yaml(run / "config.yaml", changed)
        for verb in ("test", "predict", "export"):
            result = call(verb, run, *(["--output", tmp_path / key] if verb == "export" else []))
            assert result.code in (0, 2), result.err
            assert key == "axes.x" or "standard library" in result.err
        assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("path", ["../adapter/lora", "..", "a..b", ".", "lora/", "\u2028.x"])
def test_what_is_no_path_of_a_class_is_told(path: str, llama: Path, tmp_path: Path) -> None:
    config = with_value(tiny_config(tmp_path / "data", llama), "model.adapter", {"class_path": path})
    result = call("fit", "--config", write_yaml(tmp_path / "c.yaml", config), "--run_dir", tmp_path / "run")
    assert result.code == 2, result.err


MODULE = "from residency.mitigations import Mitigation\nclass Mine(Mitigation):\n    '''Does nothing.'''\n"


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of somebody else that can be imported."""
    name = f"lab_{os.getpid()}_{abs(hash(tmp_path)) % 10**6}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("RESIDENCY_ALLOW", raising=False)
    return name


def test_code_of_others_is_told_and_can_be_refused(
    plugin: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mitigations = {"mine": {"class_path": f"{plugin}.Mine"}}
    config = with_value(tiny_config(tmp_path / "data", llama), "model.mitigations", mitigations)
    words = [
        "fit",
        "--config",
        write_yaml(tmp_path / "c.yaml", config),
        "--run_dir",
        tmp_path / "run",
        "--print_config",
    ]
    monkeypatch.setenv("RESIDENCY_ALLOW", "residency")
    refused = call(*words)
    assert refused.code == 2
    assert f"--allow {plugin}" in refused.err
    assert plugin not in sys.modules
    for allow in ("residency", plugin):
        result = call(*words, f"--allow={allow}")
        assert result.code == (0 if allow == plugin else 2), result.err
    monkeypatch.delenv("RESIDENCY_ALLOW")
    assert call(*words).code == 0
    assert plugin in imported_outside()


def test_allow_needs_the_name_of_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESIDENCY_ALLOW", raising=False)
    assert take_allow(["fit", "--x=1"]) == ["fit", "--x=1"]
    assert "RESIDENCY_ALLOW" not in os.environ
    for words in (["--allow"], ["--allow=../x"], ["--allow", "a b"]):
        with pytest.raises(UserError, match="--allow"):
            take_allow(words)
