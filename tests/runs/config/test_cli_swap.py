"""A class that is switched starts from its own defaults; the same class keeps what it was given (spec/pitfalls, J1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from residency.runs.cli import parse
from support.cli import printed_config, tiny_config, write_yaml

PARTS = "support.components"
KEYS = {"model.adapter": "Adapter", "model.mitigations.x": "Mitigation", "data.domains.a": "Domain"}


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _at(config: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config


def _part(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


@pytest.fixture
def configs(llama: Path, tmp_path: Path) -> list[Path]:
    """The tiny stream, and a second file with the first class of every pair."""
    first = write_yaml(tmp_path / "tiny.yaml", tiny_config(tmp_path / "data", llama))
    parts = {key: _part(f"{PARTS}.First{kind}", strength=7.0, own=5) for key, kind in KEYS.items()}
    second = {
        "model": {**_nested("adapter", parts["model.adapter"]), "mitigations": {"x": parts["model.mitigations.x"]}}
    }
    second |= _nested("data.domains.a", parts["data.domains.a"])
    return [first, write_yaml(tmp_path / "parts.yaml", second)]


def _words(path: str, key: str, change: Any, configs: list[Path], folder: Path) -> list[str]:
    """A command line that lays `change` over the configs, by way of `path`."""
    words = ["fit", *(word for file in configs for word in ("--config", str(file)))]
    if path == "config":
        return [*words, "--config", str(write_yaml(folder / "later.yaml", _nested(key, change)))]
    if path == "preset":
        return [*words, f"--{key}={write_yaml(folder / 'preset.yaml', change)}"]
    if "init_args" not in change:
        return [*words, f"--{key}={change['class_path']}"]
    given = [f"--{key}.{name}={value}" for name, value in change["init_args"].items()]
    return [*words, f"--{key}={change['class_path']}", *given]


@pytest.mark.parametrize("path", ["command line", "config", "preset"])
@pytest.mark.parametrize(("key", "kind"), KEYS.items())
def test_another_class_inherits_nothing(key: str, kind: str, path: str, configs: list[Path], tmp_path: Path) -> None:
    words = _words(path, key, {"class_path": f"{PARTS}.Second{kind}"}, configs, tmp_path)
    assert _at(printed_config(*words), key) == _part(f"{PARTS}.Second{kind}", strength=2.0)


@pytest.mark.parametrize("path", ["command line", "config", "preset"])
@pytest.mark.parametrize(("key", "kind"), KEYS.items())
def test_the_same_class_keeps_its_arguments(
    key: str, kind: str, path: str, configs: list[Path], tmp_path: Path
) -> None:
    words = _words(path, key, _part(f"{PARTS}.First{kind}", own=6), configs, tmp_path)
    assert _at(printed_config(*words), key) == _part(f"{PARTS}.First{kind}", strength=7.0, own=6)


@pytest.mark.parametrize(("key", "kind"), KEYS.items())
def test_an_argument_alone_changes_only_itself(key: str, kind: str, configs: list[Path]) -> None:
    files = [word for file in configs for word in ("--config", file)]
    found = _at(printed_config("fit", *files, f"--{key}.strength=9"), key)
    assert found == _part(f"{PARTS}.First{kind}", strength=9.0, own=5)


@pytest.mark.parametrize(("key", "kind"), KEYS.items())
def test_there_and_back_is_a_fresh_start(key: str, kind: str, configs: list[Path]) -> None:
    files = [word for file in configs for word in ("--config", file)]
    switched = [f"--{key}={PARTS}.Second{kind}", f"--{key}.strength=3", f"--{key}={PARTS}.First{kind}"]
    assert _at(printed_config("fit", *files, *switched), key) == _part(f"{PARTS}.First{kind}", strength=1.0, own=1)


def test_parts_of_parts(configs: list[Path]) -> None:
    words = [
        "fit",
        "--config",
        configs[0],
        "--model.adapter.config=peft.OFTConfig",
        "--model.optimizer=torch.optim.SGD",
    ]
    model = printed_config(*words)["model"]
    oft = model["adapter"]["init_args"]["config"]
    assert oft["class_path"] == "peft.OFTConfig"
    assert (oft["init_args"]["r"], oft["init_args"]["target_modules"]) == (0, None), "not those of LoRA"
    assert model["optimizer"]["init_args"]["lr"] == 1e-3, "the default of SGD"


def test_one_class_under_two_paths(configs: list[Path]) -> None:
    words = ["fit", "--config", configs[0], "--model.mitigations.x=EWC", "--model.mitigations.x.strength=3"]
    found = printed_config(*words, "--model.mitigations.x=residency.mitigations.penalties.ewc.EWC")["model"][
        "mitigations"
    ]["x"]
    assert found["init_args"]["strength"] == 3.0


def test_the_objects_are_those_of_the_config(configs: list[Path]) -> None:
    words = ["fit", *(word for file in configs for word in ("--config", str(file)))]
    words += [f"--model.adapter={PARTS}.SecondAdapter", f"--model.mitigations.x={PARTS}.SecondMitigation"]
    cli = parse(words)
    assert (type(cli.model.adapter).__name__, cli.model.adapter.strength) == ("SecondAdapter", 2.0)
    assert cli.model.mitigations["x"].strength == 2.0
    assert cli.resolved["model"]["adapter"] == _part(f"{PARTS}.SecondAdapter", strength=2.0)


def test_every_stage_has_callbacks_of_its_own(configs: list[Path]) -> None:
    cli = parse(["fit", "--config", str(configs[0]), "--trainer.callbacks+=lightning.pytorch.callbacks.Timer"])
    first, second = (cli.trainers.make(steps=1, folder=configs[0].parent, observers=[]).callbacks for _ in range(2))
    assert type(first[0]).__name__ == "Timer"
    assert first[0] is not second[0]
