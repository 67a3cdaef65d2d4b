"""What users rely on: fit, validate, test, predict, --help, --print_config, named parts and presets."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from lightning.pytorch import Trainer

from residency import adapters, backbones, domains, inspection, mitigations, objectives
from residency.domains import packaged
from residency.runs.config.class_names import class_names
from support.cli import Result, call, printed_config, read_json, tiny_config, write_yaml

DATA = ["data.domains", "data.probes"]
EWC = {"strength": 3.0, "mode": "online", "decay": 0.9, "fisher_samples": 4, "batch_tokens": 64}


@pytest.fixture(scope="module")
def config(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny stream as a config file."""
    folder = tmp_path_factory.mktemp("config")
    return write_yaml(folder / "tiny.yaml", tiny_config(folder / "data", llama))


@pytest.fixture(scope="module")
def fitted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A finished run and what its command printed."""
    run = tmp_path_factory.mktemp("runs") / "run"
    result = call("fit", "--config", config, "--run_dir", run)
    assert result.code == 0, result.err
    return run, result


@pytest.fixture
def untrainable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be trained."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was trained")

    monkeypatch.setattr(Trainer, "fit", refuse)


# -- fit ----------------------------------------------------------------------------------------------------------


def test_fit_writes_the_record(fitted: tuple[Path, Result]) -> None:
    run, result = fitted
    stages = {path.name: {file.name for file in path.iterdir()} for path in (run / "stages").iterdir()}
    assert set(stages) == {"0-base", "1-a", "2-b"}
    assert stages["0-base"] == {"stage.json", "scores.parquet", "history.jsonl"}
    assert stages["1-a"] == stages["2-b"] == {"stage.json", "scores.parquet", "state.safetensors", "history.jsonl"}
    assert {"config.yaml", "results.json", "history.jsonl", "nll.png", "nll.svg"} <= {p.name for p in run.iterdir()}
    record = read_json(run / "results.json")
    assert (record["schema"], record["status"], record["domains"], record["seed"]) == (1, "done", ["a", "b"], 0)
    assert len(record["scores"]["nll"]["R"]) == 3
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [(line["domain"], line["step"], line["stream_step"]) for line in lines] == [
        *(("a", n, n) for n in (1, 2, 3)),
        *(("b", n, n + 3) for n in (1, 2, 3)),
    ]
    assert str(run / "results.json") in result.out.replace("\n", "")
    assert "Warning" not in result.err


def test_the_saved_config_repeats_the_run(fitted: tuple[Path, Result], tmp_path: Path) -> None:
    run, _ = fitted
    assert call("fit", "--config", run / "config.yaml", "--run_dir", tmp_path / "other").code == 0
    first, second = (read_json(folder / "results.json") for folder in (run, tmp_path / "other"))
    assert first["scores"] == second["scores"]
    assert (run / "config.yaml").read_text() == (tmp_path / "other" / "config.yaml").read_text()
    frames = [pl.read_parquet(folder / "stages" / "2-b" / "scores.parquet") for folder in (run, tmp_path / "other")]
    assert frames[0].equals(frames[1])


@pytest.mark.usefixtures("untrainable")
def test_a_complete_run_is_not_trained_again(fitted: tuple[Path, Result], config: Path) -> None:
    run, _ = fitted
    before = (run / "results.json").read_bytes()
    for words in (["--config", config, "--run_dir", run], [run]):
        result = call("fit", *words)
        assert (result.code, result.err) == (0, "")
        assert "nothing to train" in result.out
    assert (run / "results.json").read_bytes() == before


def test_the_name_decides_the_folder(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("fit", "--config", config, "--name", "mine", "--trainer.max_steps=1").code == 0
    assert (tmp_path / "runs" / "mine" / "results.json").is_file()


# -- a saved stage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, None])
def test_test_gives_the_row_of_the_score_matrix(fitted: tuple[Path, Result], stage: int | None) -> None:
    run, _ = fitted
    result = call("test", run, *([] if stage is None else ["--stage", stage]))
    assert (result.code, result.err) == (0, "")
    row = 2 if stage is None else stage
    found = read_json(run / f"scores-test-{row}.json")
    record = read_json(run / "results.json")
    assert set(found["means"]) == {"nll", "accuracy", "exact_match", "rougeL"}
    for scorer, means in found["means"].items():
        wanted = record["scores"][scorer]["R"][row]
        assert [means.get(name) for name in record["domains"]] == wanted, scorer
    assert f"stage {row}" in result.out


def test_validate_scores_other_rows(fitted: tuple[Path, Result]) -> None:
    run, _ = fitted
    assert call("validate", run, "--stage", 1).code == 0
    assert call("test", run, "--stage", 1).code == 0
    validation, test = (read_json(run / f"scores-{split}-1.json") for split in ("validation", "test"))
    assert (validation["split"], validation["stage"]) == ("validation", 1)
    assert validation["means"]["nll"].keys() == test["means"]["nll"].keys()
    assert validation["means"]["nll"] != test["means"]["nll"]


def test_predict_prints_completions(fitted: tuple[Path, Result]) -> None:
    run, _ = fitted
    result = call("predict", run, "--domain", "b", "--limit", 2)
    assert (result.code, result.err) == (0, "")
    assert "prompt" in result.out
    assert result.out.count("b odd") + result.out.count("b even") == 2


# -- --print_config and --help ------------------------------------------------------------------------------------


def test_print_config_is_a_config(config: Path, fitted: tuple[Path, Result], tmp_path: Path) -> None:
    printed = printed_config("fit", "--config", config)
    kept = yaml.safe_load((fitted[0] / "config.yaml").read_text())
    assert {key: value for key, value in printed.items() if key in kept} == kept
    again = printed_config("fit", "--config", write_yaml(tmp_path / "printed.yaml", printed))
    assert again == printed


def test_print_config_shows_swapped_parts(config: Path) -> None:
    words = ["--model.adapter=Full", "--model.mitigations.ewc=EWC", "--model.mitigations.ewc.strength=3"]
    words += ["--model.optimizer=torch.optim.SGD", "--model.optimizer.momentum=0.5", "--data.order=[b, a]"]
    model = printed_config("fit", "--config", config, *words)["model"]
    assert model["adapter"] == {"class_path": "residency.adapters.Full"}
    assert model["mitigations"]["ewc"]["class_path"] == "residency.mitigations.EWC"
    assert model["mitigations"]["ewc"]["init_args"]["strength"] == 3.0
    assert model["optimizer"]["class_path"] == "torch.optim.SGD"
    assert model["optimizer"]["init_args"]["momentum"] == 0.5


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help(words: list[str]) -> None:
    result = call(*words)
    assert (result.code, result.err) == (0, "")
    for verb in ("assets", "fit", "sweep", "validate", "test", "predict"):
        assert f"\n  {verb} " in result.out


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict", "sweep", "assets"])
def test_help_of_a_verb(verb: str) -> None:
    result = call(verb, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"usage: residency {verb} ")
    if verb not in ("sweep", "assets"):
        assert "--model.mitigations" in result.out
        assert "What protects earlier domains" in " ".join(result.out.split())


CLASSES = [(key, name) for key, names in class_names().items() for name in names if key != "data.probes"]


def test_every_component_has_a_short_name() -> None:
    names = dict.fromkeys(class_names())
    parts = ["model.backbone", "model.adapter", "model.objective", "model.mitigations", *DATA, "inspection"]
    assert list(names) == parts
    assert {"Full", "Peft", "SFT", "CausalLM", "EWC", "Replay", "WeightMixing", "Jsonl"} <= {n for _, n in CLASSES}


@pytest.mark.parametrize(("key", "name"), CLASSES)
def test_help_of_a_class(key: str, name: str) -> None:
    result = call("fit", f"--{key}.help", name)
    assert (result.code, result.err) == (0, "")
    modules = (adapters, backbones, domains, mitigations, objectives, packaged, inspection)
    part = next(vars(m)[name] for m in modules if name in vars(m))
    assert inspect.getdoc(part).splitlines()[0] in result.out, "the help shows the class's own words"
    for argument in inspect.signature(part).parameters:
        assert argument in ("options", "self") or f"--{key}.{argument}" in result.out


def test_help_of_a_nested_class(config: Path) -> None:
    result = call("fit", "--config", config, "--model.adapter.config.help", "LoraConfig")
    assert (result.code, result.err) == (0, "")
    assert "lora_alpha" in result.out


def test_help_imports_no_torch() -> None:
    code = "import sys; from residency.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    assert call("--version").out.startswith("residency ")


# -- named parts and presets --------------------------------------------------------------------------------------


def test_named_parts_are_added_to_those_of_the_config(config: Path) -> None:
    words = ["--model.mitigations.ewc=EWC", "--model.mitigations.ewc.strength=3", "--model.mitigations.old=Replay"]
    found = printed_config("fit", "--config", config, *words)["model"]["mitigations"]
    assert list(found) == ["ewc", "old"]
    assert found["ewc"]["init_args"]["strength"] == 3.0
    assert found["old"]["class_path"] == "residency.mitigations.Replay"


@pytest.mark.parametrize("joined", [True, False], ids=["key=FILE", "key FILE"])
def test_presets(config: Path, tmp_path: Path, joined: bool) -> None:
    ewc = write_yaml(tmp_path / "ewc.yaml", {"class_path": "EWC", "init_args": EWC})
    full = write_yaml(tmp_path / "full.yaml", {"class_path": "residency.adapters.Full"})
    domain = write_yaml(tmp_path / "c.yaml", tiny_config(tmp_path / "data", tmp_path)["data"]["domains"]["a"])
    pairs = {"model.adapter": full, "model.mitigations.pull": ewc, "data.domains.c": domain, "data.probes.p": domain}
    words = [w for key, file in pairs.items() for w in ([f"--{key}={file}"] if joined else [f"--{key}", file])]
    found = printed_config("fit", "--config", config, *words)
    assert found["model"]["adapter"] == {"class_path": "residency.adapters.Full"}
    pull = found["model"]["mitigations"]["pull"]
    assert pull["class_path"] == "residency.mitigations.EWC"
    assert EWC.items() <= pull["init_args"].items()
    assert list(found["data"]["domains"]) == ["a", "b", "c"]
    assert found["data"]["domains"]["c"]["init_args"]["max_test"] is None, "nothing of a user's is left out by default"
    assert list(found["data"]["probes"]) == ["p"]


def test_a_config_names_presets_relative_to_itself(config: Path, tmp_path: Path) -> None:
    write_yaml(tmp_path / "full.yaml", {"class_path": "residency.adapters.Full"})
    later = write_yaml(tmp_path / "later.yaml", {"model": {"adapter": "full.yaml"}})
    found = printed_config("fit", "--config", config, "--config", later)
    assert found["model"]["adapter"] == {"class_path": "residency.adapters.Full"}


def test_a_domain_as_json(config: Path) -> None:
    domain = json.dumps({"class_path": "residency.domains.Jsonl", "init_args": {"train": "x.jsonl", "test": "y.jsonl"}})
    found = printed_config("fit", "--config", config, f"--data.domains.mine={domain}")
    assert found["data"]["domains"]["mine"]["init_args"]["train"] == "x.jsonl"
