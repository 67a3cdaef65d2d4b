"""One cell of a study by the flags of `residency fit`, and the W&B sweep whose agent calls it with them."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from residency.core.errors import UserError
from residency.runs.cli import parse
from residency.runs.config.sources import pairs
from residency.study import load_study
from residency.study.fit_cell import expand_cell
from residency.study.planning.cells import plan_cells
from residency.study.wandb_sweep import wandb_sweep, write_wandb_sweep
from support.cli import call, tiny_config, write_yaml

MITIGATIONS: dict[str, Any] = {
    "none": {},
    "replay": {"model.mitigations.old": "replay.yaml"},
    "null": {"model.mitigations.old": "replay.yaml", "model.mitigations.old.ratio": 0.25},
}
RATES = {"low": {"model.optimizer.init_args.lr": 1e-5}, "high": {"model.optimizer.init_args.lr": 0.1}}
LR = {"low": 1e-5, "high": 0.1, "log": True}


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base config and a preset."""
    folder = tmp_path_factory.mktemp("cells")
    write_yaml(folder / "base.yaml", tiny_config(folder / "data", llama))
    replay = {"class_path": "residency.mitigations.Replay", "init_args": {"ratio": 0.5, "capacity": 8}}
    write_yaml(folder / "replay.yaml", replay)
    return folder


def study_file(folder: Path, **content: Any) -> Path:
    """A study with two axes and two seeds, or what is given."""
    base = {"name": "tiny", "base": "base.yaml", "axes": {"m": MITIGATIONS, "lr": RATES}, "seeds": [0, 1]}
    return write_yaml(folder / "study.yaml", {**base, **content})


def config(words: list[str]) -> dict[str, Any]:
    """What `residency fit` makes of a command line; a list is not kept by a later call."""
    return copy.deepcopy(parse(["fit", *words]).resolved)


def option(words: list[str], key: str) -> str | None:
    """The last value of an option."""
    return next((value for word, value in reversed([*pairs(words)]) if word == f"--{key}"), None)


def agents(sweep: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """The words after `fit` that W&B's own agent calls for one point of the sweep."""
    # Takes a second to import, which every process that collects tests would pay.
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    command = create_sweep_command(list(sweep["command"]))
    args = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})["args"]
    flat = [word for part in command for word in (args if part == "${args}" else [part])]
    assert flat[:5] == ["${env}", "${interpreter}", "-m", "${program}", "fit"]
    return flat[5:]


# -- one cell -------------------------------------------------------------------------------------------------------


def test_words_without_a_study_are_left_alone() -> None:
    words = ["--config", "x.yaml", "--name=y", "--model.adapter", "z"]
    assert expand_cell(words) == words


def test_a_cell_by_name_and_by_place_are_the_words_of_the_cell(folder: Path) -> None:
    path = study_file(folder)
    for cell in plan_cells(load_study(path)):
        by_name = expand_cell(["--study", str(path), f"--cell={cell.id}"])
        place = [f"--axes.{axis}={value}" for axis, value in cell.axes.items()]
        by_place = expand_cell([f"--study={path}", *place, "--seed_everything", str(cell.seed)])
        assert by_name == by_place
        assert tuple(by_name[:-4]) == cell.words
        where = {key: option(by_name, key) for key in ("name", "run_dir", "store")}
        assert where == {"name": cell.id, "run_dir": f"studies/tiny/cells/{cell.id}", "store": "studies/tiny/store"}


def test_what_is_given_beside_the_cell_counts_more_and_has_a_folder_of_its_own(folder: Path) -> None:
    path = study_file(folder)
    words = expand_cell([f"--study={path}", "--cell=none-low-s0", "--model.optimizer.lr=0.5", "--seed_everything=7"])
    found = config(words)
    assert found["model"]["optimizer"]["init_args"]["lr"] == 0.5
    assert found["seed_everything"] == 7
    assert Path(str(option(words, "run_dir"))).parent == Path("studies/tiny/more")
    other = expand_cell([f"--study={path}", "--cell=none-low-s0", "--model.optimizer.lr=0.6", "--seed_everything=7"])
    assert option(other, "run_dir") != option(words, "run_dir")
    mine = expand_cell([f"--study={path}", "--cell=none-low-s0", "--run_dir=here", "--store=there"])
    assert [option(mine, key) for key in ("run_dir", "store")] == ["here", "there"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--cell=nonne-low-s0"], "did you mean 'none-low-s0'"),
        (["--axes.m=none"], "4 of its 12 cells fit, such as none-low-s0 and none-low-s1"),
        (["--axes.m=nope", "--axes.lr=low", "--seed_everything=0"], "0 of its 12 cells fit"),
        ([], "no choice"),
        (["--cell"], "it has no value"),
        (["stray", "--cell=none-low-s0"], "belongs to no option"),
    ],
)
def test_mistakes(folder: Path, words: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        expand_cell([f"--study={study_file(folder)}", *words])
    assert part in str(caught.value)


# -- the sweep of W&B -----------------------------------------------------------------------------------------------


def test_an_agent_gives_every_cell_its_own_config(folder: Path) -> None:
    """Recorded argv: what W&B's agent makes of the file, parsed by the command line, is the cell."""
    path = study_file(folder)
    study = load_study(path)
    write_wandb_sweep(study, plan_cells(study), source=path, path=folder / "sweep.yaml")
    sweep = yaml.safe_load((folder / "sweep.yaml").read_text())
    assert sweep["method"] == "grid"
    assert sweep["parameters"] == {
        "axes.m": {"values": ["none", "replay", "null"]},
        "axes.lr": {"values": ["low", "high"]},
        "seed_everything": {"values": [0, 1]},
    }
    cells = plan_cells(study)
    for cell in cells[::5]:
        values = {f"axes.{axis}": value for axis, value in cell.axes.items()} | {"seed_everything": cell.seed}
        found, wanted = config(expand_cell(agents(sweep, values))), config(list(cell.words))
        assert (found.pop("store"), found["wandb"].pop("study")) == ("studies/tiny/store", "tiny")
        assert (wanted.pop("store"), wanted["wandb"].pop("study")) == (None, None)
        assert found == wanted


def test_the_whole_command_is_one_that_an_agent_runs(folder: Path) -> None:
    path = study_file(folder)
    sweep = wandb_sweep(load_study(path), plan_cells(load_study(path)), source=path)
    assert sweep["command"] == ["${env}", "${interpreter}", "-m", "${program}", "fit", f"--study={path}", "${args}"]
    assert sweep["program"] == "residency"
    assert os.path.isabs(sweep["command"][5].partition("=")[2]), "agents start anywhere"


def test_a_grid_with_holes_names_its_cells(folder: Path) -> None:
    path = study_file(folder, exclude=[{"m": "replay", "lr": "high"}])
    study = load_study(path)
    sweep = wandb_sweep(study, plan_cells(study), source=path)
    assert [*sweep["parameters"]] == ["cell"]
    assert len(sweep["parameters"]["cell"]["values"]) == 10
    words = expand_cell(agents(sweep, {"cell": "null-high-s1"}))
    assert tuple(words[:-4]) == next(cell.words for cell in plan_cells(study) if cell.id == "null-high-s1")


NAMES = st.text("ab.=- 1", min_size=1, max_size=4).filter(lambda name: name.strip())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(axes=st.dictionaries(NAMES, st.lists(NAMES, min_size=1, max_size=3, unique=True), max_size=3), data=st.data())
def test_every_point_of_every_grid_is_its_cell(folder: Path, axes: dict[str, list[str]], data: st.DataObject) -> None:
    path = study_file(folder, axes={axis: {value: {} for value in values} for axis, values in axes.items()})
    try:
        cells = plan_cells(load_study(path))
    except UserError:
        return  # two names that look the same in a folder
    sweep = yaml.safe_load(yaml.safe_dump(wandb_sweep(load_study(path), cells, source=path)))
    assert all(key.count(".") <= 3 for key in sweep["parameters"])
    cell = data.draw(st.sampled_from(cells))
    place = {f"axes.{axis}": value for axis, value in cell.axes.items()} | {"seed_everything": cell.seed}
    values = {"cell": cell.id} if "cell" in sweep["parameters"] else place
    assert all(value in sweep["parameters"][key]["values"] for key, value in values.items())
    assert tuple(expand_cell(agents(sweep, values))[:-4]) == cell.words


def search_study(folder: Path, **parameters: Any) -> Path:
    """A study with a search section and no axes."""
    search = {"parameters": {"model.optimizer.init_args.lr": LR, **parameters}, "trials": 9, "seeds": [5, 6]}
    return study_file(folder, axes={}, search=search)


def test_a_search_is_one_of_w_and_b_on_validation_rows(folder: Path) -> None:
    path = search_study(
        folder,
        **{
            "data.batch_size": {"low": 2, "high": 8},
            "model.adapter.config.init_args.r": {"low": 1, "high": 64, "log": True},
            "model.mitigations": {"choices": [None, {"old": {"class_path": "residency.mitigations.Replay"}}]},
            "model.adapter.config.init_args.use_rslora": {"choices": [True, False]},
        },
    )
    study = load_study(path)
    sweep = yaml.safe_load(yaml.safe_dump(wandb_sweep(study, plan_cells(study), source=path)))
    assert sweep["method"] == "bayes"
    assert sweep["metric"] == {"name": "final/nll/average", "goal": "maximize"}
    assert sweep["run_cap"] == 9
    space = sweep["parameters"]
    assert space["model.optimizer.lr"] == {"distribution": "log_uniform_values", "min": 1e-5, "max": 0.1}
    assert space["data.batch_size"] == {"min": 2, "max": 8}
    assert space["seed_everything"] == {"values": [5, 6]}
    values = {
        "model.optimizer.lr": 3.2e-05,
        "data.batch_size": 4,
        "model.adapter.config.r": 8,
        "model.mitigations": space["model.mitigations"]["values"][0],
        "model.adapter.config.use_rslora": True,
        "seed_everything": 5,
    }
    assert {*values} == {*space}
    found = config(expand_cell(agents(sweep, values)))
    assert found["split"] == "validation", "test rows are never searched over"
    assert found["model"]["optimizer"]["init_args"]["lr"] == 3.2e-05
    assert found["data"]["batch_size"] == 4
    assert found["model"]["adapter"]["init_args"]["config"]["init_args"]["r"] == 8
    assert found["model"]["adapter"]["init_args"]["config"]["init_args"]["use_rslora"] is True
    assert found["model"]["mitigations"] is None
    assert found["seed_everything"] == 5
    replay = config(
        expand_cell(agents(sweep, {**values, "model.mitigations": space["model.mitigations"]["values"][1]}))
    )
    assert [*replay["model"]["mitigations"]] == ["old"]
    json.dumps(sweep)


def test_what_w_and_b_cannot_search_is_refused(folder: Path) -> None:
    path = search_study(folder, **{"model.mitigations.old.a.b.c": LR})
    with pytest.raises(UserError, match="more than 3 dots"):
        wandb_sweep(load_study(path), plan_cells(load_study(path)), source=path)
    path = study_file(folder, search={"parameters": {"model.optimizer.init_args.lr": LR}})
    with pytest.raises(UserError, match="several combinations"):
        wandb_sweep(load_study(path), plan_cells(load_study(path)), source=path)


def test_the_command_writes_the_file(folder: Path) -> None:
    path = study_file(folder)
    result = call("sweep", path, "--emit-wandb", folder / "written.yaml")
    assert result.code == 0, result.err
    assert "wandb sweep" in result.out
    text = (folder / "written.yaml").read_text()
    assert text.startswith(f"# residency sweep {path} --emit-wandb")
    assert yaml.safe_load(text) == wandb_sweep(load_study(path), plan_cells(load_study(path)), source=path)


def test_fit_takes_a_cell_of_a_study(folder: Path) -> None:
    result = call("fit", "--study", study_file(folder), "--cell=null-high-s1", "--print_config")
    assert result.code == 0, result.err
    found = yaml.safe_load(result.out)
    assert (found["name"], found["seed_everything"]) == ("null-high-s1", 1)
    assert found["model"]["mitigations"]["old"]["init_args"]["ratio"] == 0.25
