"""Names on a command line and in a config mean what the files mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from residency.core.errors import UserError
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


@pytest.fixture
def own_scorers(tmp_path: Path) -> Path:
    """Presets of scorers of the user: `mine`, and one that has the name of a scorer of the package."""
    folder = tmp_path / "configs" / "scorer"
    folder.mkdir(parents=True)
    for name in ("mine", "json_valid"):
        write_yaml(folder / f"{name}.yaml", _pattern(name))
    return folder


def _pattern(label: str) -> dict[str, object]:
    return {"class_path": "residency.scorers.Regex", "init_args": {"pattern": "^a", "label": label}}


def test_scorers_are_given_by_the_names_of_their_presets(config: Path, own_scorers: Path, tmp_path: Path) -> None:
    """Among the words, in a config, in a preset of a domain: the user's own, then short names, then those shipped."""
    given = ["nll", "mine", "json_valid", "regex", "configs/scorer/mine.yaml"]
    content = tiny_config(tmp_path / "data", tmp_path)
    domain = content["data"]["domains"]["a"]
    domain["init_args"]["scorers"] = given
    (tmp_path / "configs" / "domain").mkdir()
    write_yaml(tmp_path / "configs" / "domain" / "own.yaml", domain)
    named = {"data": {"domains": {"a": "own"}}}
    shipped = {"class_path": "residency.scorers.Regex", "init_args": {"pattern": r"^\w+\(.*\)$", "label": "regex"}}
    wanted = ["nll", _pattern("mine"), _pattern("json_valid"), shipped, _pattern("mine")]
    shipped["init_args"] |= {"full": False, "capture": False}  # type: ignore[operator]
    words = expand_presets([f"--data.domains.a.scorers={json.dumps(given)}"])
    assert json.loads(words[0].partition("=")[2]) == wanted
    # A file is looked for where the one that names it lies.
    domain["init_args"]["scorers"] = given[:-1]
    write_yaml(tmp_path / "configs" / "domain" / "own.yaml", domain)
    for inserted in (
        insert_presets(named, folder=tmp_path)["data"]["domains"]["a"],
        insert_presets({"data": {"domains": {"a": domain}}}, folder=tmp_path)["data"]["domains"]["a"],
        json.loads(expand_presets(["--data.domains.a=own"])[0].partition("=")[2]),
    ):
        assert inserted["init_args"]["scorers"] == wanted[:-1]


def test_a_run_scores_with_a_preset_of_the_user(config: Path, own_scorers: Path, tmp_path: Path) -> None:
    own = write_yaml(tmp_path / "own.yaml", {"data": {"domains": {"a": {"init_args": {"scorers": ["nll", "mine"]}}}}})
    domain = printed_config("fit", "--config", config, "--config", own)["data"]["domains"]["a"]
    assert [one if isinstance(one, str) else one["init_args"]["label"] for one in domain["init_args"]["scorers"]] == [
        "nll",
        "mine",
    ]


def test_a_preset_of_a_scorer_without_a_class_is_told(config: Path, own_scorers: Path) -> None:
    (own_scorers / "mine.yaml").write_text("pattern: ^a\n")
    with pytest.raises(UserError, match=r"mine: the file has no class_path(.|\n)*residency presets scorer"):
        expand_presets(["--data.domains.a.scorers=[mine]"])


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
