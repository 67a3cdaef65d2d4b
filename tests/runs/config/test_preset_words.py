"""Names on a command line and in a config mean what the files mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from residency.runs.config.preset_words import expand_presets, insert_presets
from support.cli import call, printed_config, tiny_config, write_yaml

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"


@pytest.fixture
def config(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_yaml(tmp_path / "c.yaml", tiny_config(tmp_path / "data", llama))


def test_a_name_is_its_file(config: Path) -> None:
    start = ("fit", "--config", config)
    named = printed_config(*start, "--model.adapter", "dora", "--model.mitigations.r", "replay")
    files = printed_config(
        *start,
        f"--model.adapter={CONFIGS}/adapter/dora.yaml",
        f"--model.mitigations.r={CONFIGS}/mitigation/replay.yaml",
    )
    assert named == files
    assert named["model"]["adapter"]["init_args"]["config"]["init_args"]["use_dora"]


def test_values_follow_inline(config: Path) -> None:
    words = ["--model.adapter", "lora", "--model.adapter.r", "16", "--model.adapter.lr_ratio", "2.0"]
    more = ["--model.mitigations.ewc", "ewc", "--model.mitigations.ewc.strength", "3.5"]
    model = printed_config("fit", "--config", config, *words, *more)["model"]
    assert model["adapter"]["init_args"]["config"]["init_args"]["r"] == 16
    assert model["adapter"]["init_args"]["lr_ratio"] == 2.0
    assert model["mitigations"]["ewc"]["init_args"]["strength"] == 3.5


def test_a_value_of_the_configs_own_adapter(config: Path) -> None:
    model = printed_config("fit", "--config", config, "--model.adapter.r=2")["model"]
    assert model["adapter"]["init_args"]["config"]["init_args"]["r"] == 2


def test_names_inside_of_a_config(config: Path, tmp_path: Path) -> None:
    own = write_yaml(
        tmp_path / "own.yaml", {"model": {"adapter": "dora", "mitigations": {"a": "ewc", "b": "presets/mine.yaml"}}}
    )
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/mine.yaml").write_text((CONFIGS / "mitigation/replay.yaml").read_text())
    model = printed_config("fit", "--config", config, "--config", own)["model"]
    assert [m["class_path"].rpartition(".")[2] for m in model["mitigations"].values()] == ["EWC", "Replay"]
    assert model["adapter"]["init_args"]["config"]["init_args"]["use_dora"]


def test_the_shipped_quickstart_by_name_from_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert printed_config("fit", "--config", "quickstart")["name"] == "quickstart"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--config", "quickstrat"], "quickstart"),
        (["--model.adapter", "lora_pluss"], "lora_plus"),
        (["--model.mitigations.x", "repaly"], "replay"),
    ],
)
def test_did_you_mean(config: Path, words: list[str], meant: str) -> None:
    result = call("fit", "--config", config, *words)
    assert result.code == 2
    assert f"did you mean {meant!r}" in result.err


def test_what_is_no_preset_stays_as_it_is(tmp_path: Path) -> None:
    words = ["fit", "--model.adapter", "Full", "--name", "lora", "--model.adapter.help", "Peft", "--frozen=true"]
    assert expand_presets(words) == ["fit", "--model.adapter=Full", *words[3:]]
    config = {"name": "lora", "model": {"adapter": {"class_path": "x"}, "layout": "lora"}, "data": {"domains": None}}
    assert insert_presets(config, folder=tmp_path) == config
