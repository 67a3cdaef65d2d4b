"""Every file in configs: its launch line parses, presets name all arguments of our classes, studies plan."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from residency.backbones import CausalLM
from residency.runs.cli import ResidencyCLI, parse
from residency.study import load_study, plan_cells
from support.cli import printed_config

ROOT = Path(__file__).parents[3]
FILES = [path.relative_to(ROOT) for path in sorted((ROOT / "configs").rglob("*")) if path.is_file()]
QUICKSTART = "configs/quickstart.yaml"
# Where a preset of a folder goes; the name of an entry is free.
KEYS = {
    "adapter": "model.adapter",
    "objective": "model.objective",
    "mitigation": "model.mitigations.x",
    "domain": "data.domains.x",
    "inspection": "inspection.x",
    "scheduler": "model.scheduler",
}


def _in(*folders: str) -> list[Path]:
    return [path for path in FILES if (path.parts[1] if len(path.parts) > 2 else "") in folders]


PRESETS, OVERLAYS, STUDIES, RUNS = _in(*KEYS), _in("backbone", "stream", "trainer"), _in("studies"), _in("")
SCORERS, LOGGERS, AUGMENTATIONS = _in("scorer"), _in("logger"), _in("augmentation")


def _long(path: Path) -> Any:
    return pytest.mark.slow if path.stem == "ablation" else ()


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config


def _parts(given: Any, resolved: Any) -> list[tuple[str, set[str], set[str]]]:
    """(class, arguments that are named, arguments that there are) of a component and of those inside it."""
    found = []
    if isinstance(given, dict) and "class_path" in given:
        named, known = given.get("init_args", {}), resolved.get("init_args", {})
        found.append((given["class_path"], set(named), set(known)))
        given, resolved = named, known
    if isinstance(given, dict):
        found += [part for name in given for part in _parts(given[name], resolved[name])]
    return found


def test_every_file_is_visited() -> None:
    on_disk = sum(len(files) for _, _, files in os.walk(ROOT / "configs"))
    assert len(FILES) == on_disk >= 16
    assert sorted([*PRESETS, *SCORERS, *LOGGERS, *AUGMENTATIONS, *OVERLAYS, *STUDIES, *RUNS]) == FILES
    assert {path.suffix for path in FILES} == {".yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_first_line_launches_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    line = text.splitlines()[0].removeprefix("# ")
    # What learns from pairs is launched on a file of the user's.
    program, verb, *words = shlex.split(line.replace("FILE", QUICKSTART).replace("<pairs>", "code"))
    assert program == "residency"
    named = {part for word in words for part in re.split(r"[\[\],=]", word)}
    assert named & {str(path), path.stem}, "the line is about this file"
    assert text.splitlines()[1].startswith("# "), "the second line says what it is"
    assert all((ROOT / name).is_file() for name in re.findall(r"configs/[\w./-]+\.\w+", text))
    if verb == "sweep":
        assert load_study(Path(words[0])).name
    else:
        assert printed_config(verb, *words)["model"]["adapter"]["class_path"]


@pytest.mark.parametrize("path", SCORERS, ids=str)
def test_a_scorer_preset_is_complete(path: Path) -> None:
    """Its own launch line builds it, all options are named, and the short name of the same options is the file's."""
    line = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    # What scores pairs is launched on a file of the user's.
    words = shlex.split(line.replace("FILE", QUICKSTART).replace("<pairs>", "code"))[1:]
    (name,) = (word.split(".")[2] for word in words if ".scorers=" in word)
    domain = parse(words).datamodule.domains[name]
    assert path.stem in domain.scorers
    given, scorer = _read(path), domain.scorers[path.stem]
    assert given["class_path"] == f"residency.scorers.{type(scorer).__name__}"
    assert {*given.get("init_args", {})} == {field.name for field in fields(scorer)}  # type: ignore[arg-type]


@pytest.mark.parametrize("path", AUGMENTATIONS, ids=str)
def test_an_augmentation_preset_names_every_argument(path: Path) -> None:
    """Its own launch line means it, and its name means the same as its path."""
    words = shlex.split(path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))[1:]
    named = [word.replace(f"[{path}]", f"[{path.stem}]") for word in words]
    assert named != words
    for line in (words, named):
        resolved = ResidencyCLI(line, run=False, build=False).resolved
        assert resolved["data"]["domains"]["legal"]["init_args"]["augment"] == [_read(path)]


@pytest.mark.parametrize("path", [path for path in PRESETS if path.parts[1] != "domain"], ids=str)
def test_a_preset_names_every_argument(path: Path) -> None:
    """What a preset leaves out would be inherited from whatever it is laid over."""
    key = KEYS[path.parts[1]]
    resolved = _at(_alone(path), key)
    assert resolved["class_path"].startswith("residency."), "found under its public name"
    parts = _parts(_read(path), resolved)
    assert parts
    for name, named, known in parts:
        assert named <= known, name
        assert named == known or not name.startswith("residency."), f"{name} does not name {known - named}"


@cache
def _mitigations() -> dict[str, Any]:
    """{name of a preset: what it is}: they lie beside each other, so that one line reads them all."""
    words = [f"--model.mitigations.{path.stem}={path}" for path in _in("mitigation")]
    found: dict[str, Any] = printed_config("fit", "--config", QUICKSTART, *words)["model"]["mitigations"]
    return found


@cache
def _with_adapter(path: Path) -> ResidencyCLI:
    """The quickstart with an adapter that has nothing below it."""
    return parse(["fit", "--config", QUICKSTART, "--model.adapter=Full", f"--model.adapter={path}"])


@cache
def _alone(path: Path) -> dict[str, Any]:
    if path.parts[1] == "mitigation":
        return {"model": {"mitigations": {"x": _mitigations()[path.stem]}}}
    if path.parts[1] == "adapter":
        return _with_adapter(path).resolved
    return printed_config("fit", "--config", QUICKSTART, f"--{KEYS[path.parts[1]]}={path}")


def _like(path: Path) -> list[Path]:
    """Siblings that a preset could inherit from: those that name the same classes; else its neighbour."""
    siblings = [other for other in _in(path.parts[1]) if other != path]
    same = [other for other in siblings if _classes(_read(other)) == _classes(_read(path))]
    return same or siblings[:1]


def _classes(given: Any) -> list[str]:
    if not isinstance(given, dict):
        return []
    own = [given["class_path"]] if "class_path" in given else []
    return [*own, *(name for value in given.values() for name in _classes(value))]


@pytest.mark.slow
@pytest.mark.parametrize("path", PRESETS, ids=str)
def test_a_preset_is_the_same_over_its_siblings(path: Path) -> None:
    key, words = KEYS[path.parts[1]], ["fit", "--config", QUICKSTART]
    siblings = _like(path)
    changed = []
    if path.parts[1] == "mitigation":
        preset = _read(path)
        numbers = {name: value for name, value in preset["init_args"].items() if type(value) in (float, int)}
        first = min(numbers, key=lambda name: isinstance(numbers[name], int))
        other = 0.125 if isinstance(numbers[first], float) else 7
        changed = [f"--{key}={preset['class_path']}", f"--{key}.{first}={other}"]
    over = printed_config(*words, *(f"--{key}={sibling}" for sibling in siblings), *changed, f"--{key}={path}")
    assert _at(over, key) == _at(_alone(path), key)


@pytest.mark.parametrize("path", _in("adapter"), ids=str)
def test_an_adapter_preset_fits_a_model(path: Path, llama: Path) -> None:
    module = _with_adapter(path).model
    module.backbone = CausalLM(path=str(llama))
    module.build(seed=0)
    assert module.adapter.trainable(module.model)


def _part_of(given: Any, resolved: Any) -> bool:
    if isinstance(given, dict):
        return all(_part_of(value, resolved[key]) for key, value in given.items())
    return bool(given == resolved)


@pytest.mark.parametrize("path", LOGGERS, ids=str)
def test_a_logger_is_lightnings_own_with_its_arguments(path: Path) -> None:
    found = printed_config("fit", "--config", QUICKSTART, "--trainer.logger", path)["trainer"]["logger"]
    assert found == {"class_path": _read(path)["class_path"], "init_args": found["init_args"]}
    assert _read(path)["init_args"].items() <= found["init_args"].items()


@pytest.mark.parametrize("path", OVERLAYS, ids=str)
def test_an_overlay_is_part_of_a_config(path: Path) -> None:
    given = _read(path)
    resolved = printed_config("fit", "--config", QUICKSTART, "--config", path)
    for section, values in given.items():
        if not isinstance(values, dict):
            assert values == resolved[section]
            continue
        for key, value in values.items():
            if key == "adapter":
                assert resolved[section][key] == _alone((path.parent / value).resolve().relative_to(ROOT))[section][key]
                continue
            if key not in ("domains", "probes"):
                assert _part_of(value, resolved[section][key])
                continue
            assert list(resolved[section][key]) == list(value), "the overlay's domains alone"
            for name, named, known in _parts(value, resolved[section][key]):
                assert named <= known, name
    if "domains" in given.get("data", {}):
        assert list(given["data"]["domains"]) == given["data"]["order"]


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_a_run_can_be_built(path: Path) -> None:
    cli = parse(["fit", "--config", str(path)])
    assert list(cli.datamodule.columns)
    assert cli.resolved["name"] == path.stem


@pytest.mark.parametrize("path", STUDIES, ids=str)
def test_a_study_has_cells_under_its_name(path: Path) -> None:
    study = load_study(path)
    cells = plan_cells(study)
    assert study.name == path.stem
    assert len({cell.id for cell in cells}) == len(cells) > 1
    assert parse(["fit", *cells[-1].words]).resolved["axes"] == dict(cells[-1].axes)


# Each cell is parsed: of many cells `make test-slow` does it.
@pytest.mark.parametrize("path", [pytest.param(path, marks=_long(path)) for path in STUDIES], ids=str)
def test_every_cell_of_a_study_can_be_built(path: Path) -> None:
    cells = plan_cells(load_study(path))
    configs = [parse(["fit", *cell.words]).resolved for cell in cells]
    assert [config["axes"] for config in configs] == [dict(cell.axes) for cell in cells]
    different = [{**config, "name": "", "axes": {}} for config in configs]
    assert all(different.count(config) == 1 for config in different), "two cells would be the same run"
