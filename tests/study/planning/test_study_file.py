"""A study file becomes cells: names, folders, presets, and everything that can be wrong before a run starts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from residency.core.errors import UserError
from residency.study import Study, load_study, plan_cells

BASE = {"name": "s", "base": "base.yaml"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a base config and two presets."""
    (tmp_path / "base.yaml").write_text("name: base\n")
    (tmp_path / "presets").mkdir()
    for name in ("one", "two"):
        (tmp_path / "presets" / f"{name}.yaml").write_text(f"class_path: {name}\n")
    return tmp_path


def load(folder: Path, **content: Any) -> Study:
    """A study from a file with these keys."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**BASE, **content}, sort_keys=False))
    return load_study(path)


def refused(folder: Path, *parts: str, **content: Any) -> None:
    """The study is refused with these parts in the message."""
    with pytest.raises(UserError) as caught:
        plan_cells(load(folder, **content))
    for part in parts:
        assert part in str(caught.value)


def test_every_combination_in_the_order_of_the_file(folder: Path) -> None:
    axes = {"adapter": {"a": {"model.adapter": "presets/one.yaml"}, "b": {}}, "lr": {"low": {"x.lr": 1e-4}, "high": {}}}
    cells = plan_cells(load(folder, axes=axes, seeds=[0, 3]))
    wanted = list(itertools.product("ab", ("low", "high"), (0, 3)))
    assert [cell.id for cell in cells] == [f"{a}-{lr}-s{seed}" for a, lr, seed in wanted]
    assert [(*cell.axes.values(), cell.seed) for cell in cells] == wanted
    assert cells[0].words == (
        "--config",
        str(folder / "base.yaml"),
        f"--model.adapter={folder / 'presets' / 'one.yaml'}",
        "--x.lr=0.0001",
        "--seed_everything=0",
        "--name=a-low-s0",
        '--axes={"adapter": "a", "lr": "low"}',
    )


def test_a_study_without_axes_is_its_seeds(folder: Path) -> None:
    assert [cell.id for cell in plan_cells(load(folder, seeds=[1, 2]))] == ["s1", "s2"]
    assert [cell.id for cell in plan_cells(load(folder))] == ["s0"]


def test_literals_are_written_as_the_parser_reads_them(folder: Path) -> None:
    keys = {"a": None, "b": True, "c": [1, "x"], "d": {"e": 0.5}, "f": "text", "g": "null"}
    words = plan_cells(load(folder, axes={"x": {"v": keys}}))[0].words[2:-3]
    assert words == ("--a=null", "--b=true", '--c=[1, "x"]', '--d={"e": 0.5}', "--f=text", "--g=null")


def test_numbers_are_names(folder: Path) -> None:
    study = load(folder, axes={"rank": {"8": {"r": 8}, "0.5": {}}}, baseline="8")
    assert [cell.id for cell in plan_cells(study)] == ["8-s0", "0.5-s0"]
    assert [cell.axes for cell in plan_cells(study)] == [{"rank": "8"}, {"rank": "0.5"}]


@pytest.mark.parametrize("name", [True, False, None, 8, 0.5])
def test_words_that_yaml_takes_for_something_else(name: object, folder: Path) -> None:
    refused(folder, "in quotes", axes={"replay": {name: {}}})


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../x", "x"),
        ("/etc/passwd", "etc_passwd"),
        ("..", "value"),
        ("", "value"),
        ("a b\nc", "a_b_c"),
        ("naïve", "na_ve"),
        ("--name=x", "name_x"),
        ("心", "value"),
        ("x" * 500, "x" * 60),
        (".hidden", "hidden"),
    ],
)
def test_hostile_names_stay_in_the_folder(name: str, safe: str, folder: Path) -> None:
    cells = plan_cells(load(folder, axes={"axis": {name: {}}}))
    assert [cell.id for cell in cells] == [f"{safe}-s0"]
    assert (folder / "cells" / cells[0].id).resolve().parent == folder / "cells"
    assert json.loads(cells[0].words[-1].removeprefix("--axes=")) == {"axis": name}, "the name itself is kept"


@pytest.mark.parametrize(
    "axes",
    [
        {"x": {"a/b": {}, "a b": {}}},
        {"x": {"A": {}, "a": {}}},
        {"x": {"a-b": {}, "a": {}}, "y": {"c": {}, "b-c": {}}},
        {"x": {"y" * 70: {}, "y" * 80: {}}},
        {"x": {"心": {}, "魂": {}}},
    ],
)
def test_two_cells_never_share_a_folder(axes: dict[str, Any], folder: Path) -> None:
    refused(folder, "would share the folder", "rename", axes=axes)


def test_the_same_study_wherever_it_is_stored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = load(folder, axes={"x": {"a": {"model.adapter": "presets/one.yaml", "config": "presets/two.yaml"}}})
    moved = tmp_path_factory.mktemp("moved") / "study.yaml"
    moved.write_text(yaml.safe_dump(vars(first), sort_keys=False))
    assert load_study(moved) == first
    assert plan_cells(load_study(moved)) == plan_cells(first)


@pytest.mark.parametrize("name", ["../../x", "a/b", "/tmp/x", "..", ".", ""])
def test_the_name_is_one_folder(name: str, folder: Path) -> None:
    refused(folder, f"name is {name!r}", "--study_dir", name=name)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"axis": {}}, ("the key 'axis'", "did you mean 'axes'")),
        ({"seeds": "many"}, ("seeds: many", "a list")),
        ({"seeds": [0, "x"]}, ("seeds", "an integer")),
        ({"axes": ["a"]}, ("axes: ['a']", "a mapping")),
        ({"axes": {"x": ["a"]}}, ("axes", "a mapping")),
        ({"base": None}, ("missing: base",)),
        ({"base": "nope.yaml"}, ("nope.yaml", "correct base")),
        ({"axes": {"x": {}}}, ("axes without values ['x']",)),
        ({"seeds": []}, ("seeds []",)),
        ({"seeds": [1, 1]}, ("seeds [1, 1]",)),
        ({"axes": {"x": {"a": {}}}, "baseline": "b"}, ("baseline is 'b'", "the first axis has a")),
        (
            {"axes": {"x": {"a": {"model.adapter": "presets/three.yaml"}}}},
            ("model.adapter: presets/three.yaml", "no file"),
        ),
    ],
)
def test_mistakes(content: dict[str, Any], parts: tuple[str, ...], folder: Path) -> None:
    refused(folder, *parts, **content)


@pytest.mark.parametrize(
    ("text", "part"),
    [("", "holds nothing"), ("- a\n", "holds list"), ("name: [\n", "is not YAML"), ("base: x\n", "name")],
)
def test_files_that_are_no_study(text: str, part: str, folder: Path) -> None:
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=part):
        load_study(folder / "bad.yaml")


def test_a_file_that_is_not_there(folder: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nope\.yaml: No such file"):
        load_study(folder / "nope.yaml")
